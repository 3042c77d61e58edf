"""AddLora, our operator for ONNX Runtime: one node at a projection, and any number of adapters on one model.

add_lora.c is the operator, add_lora.cu has its kernels for a GPU, and library.py compiles both;
stages/graph/lora_graph.py writes the graph that uses it.

AddLora keeps A and B in int8, as its graph rounds activations anyway; AddLoraExact in float32.
"""

DOMAIN = "olive_lab"
# by execution provider and element type, and by whether the graph's own products are exact
OPERATORS = {
    ("cpu", "FLOAT", False): "AddLora",
    ("cpu", "FLOAT", True): "AddLoraExact",
    ("cuda", "FLOAT16", False): "AddLoraCuda",
}
NUMBER = "adapter"  # the graph's input: an adapter's number, [1]; 0 for none
