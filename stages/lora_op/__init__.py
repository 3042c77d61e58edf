"""AddLora, our operator for ONNX Runtime: one node at a projection, and any number of adapters on one model.

add_lora.c is the operator, add_lora.cu has its kernels for a GPU, and library.py compiles both;
stages/graph/lora_graph.py writes the graph that uses it.
"""

DOMAIN = "olive_lab"
# by (on a CPU, element type)
OPERATORS = {(True, "FLOAT"): "AddLora", (False, "FLOAT16"): "AddLoraCuda"}
NUMBER = "adapter"  # the graph's input: an adapter's number, [1]; 0 for none
