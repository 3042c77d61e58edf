"""Olive passes of our own: activation-aware quantization and optional LoRA inputs."""
