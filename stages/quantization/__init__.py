"""How weights become 4 bits: scales (AWQ), error compensation, tuning, calibration, perplexity.."""
