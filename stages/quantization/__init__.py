"""How weights become 4 bits: scales (AWQ), error compensation, calibration, perplexity. Serves quantize."""
