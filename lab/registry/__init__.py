"""Registered models: in Azure ML and in git."""
