"""The ONNX graphs: the export, its LoRA inputs, the packed embedding. Serves optimize."""
