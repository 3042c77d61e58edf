"""See runs while they run: those of this clone and Azure ML jobs. `lab watch`."""
