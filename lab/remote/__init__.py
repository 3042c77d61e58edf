"""The Azure Blob remote: its settings, reaching it, setting it up, checking what it holds."""
