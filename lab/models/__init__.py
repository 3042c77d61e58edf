"""Talk to the model, and bring other adapters to it."""
