"""The `lab` command: what people do with the pipeline's results, and on the way to them."""
