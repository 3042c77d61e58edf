"""What lm-evaluation-harness says of our models, on tasks that have nothing to do with the training."""
