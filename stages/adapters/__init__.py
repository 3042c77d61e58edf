"""LoRA adapters as the inputs of a graph."""
