"""Weights in memory: float or packed checkpoints as PyTorch modules, and the device they live on."""
