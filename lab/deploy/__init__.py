"""`lab deploy`: the server of `lab serve` in a container, here or behind an Azure ML endpoint."""
