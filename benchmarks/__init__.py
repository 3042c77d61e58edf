"""Measurements: ours, the peer and the limit side by side, from one run, kept as JSON in results/."""
