"""What the graphs that take adapters are called, and an adapter's tensors."""

LORA_GRAPH = "lora.onnx"  # A and B are inputs: for any ONNX Runtime
OPERATOR_GRAPH = "lora_op.onnx"  # the same sums by the operator of stages/lora_op
A, B = (
    ".lora_A.weight",
    ".lora_B.weight",
)  # ends of names; before them PEFT's name of the projection
