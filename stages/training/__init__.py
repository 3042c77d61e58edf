"""How a LoRA adapter is trained: rows and their order, trainer, kernels. Serves finetune."""
