"""The ONNX model behind OpenAI's HTTP interface: `lab serve`."""
