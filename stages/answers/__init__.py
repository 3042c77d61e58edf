"""The ONNX model in use: generation, decode speed, agreement with PyTorch."""
