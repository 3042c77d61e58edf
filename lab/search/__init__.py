"""`lab search`: find the settings that are best within limits; DVC's experiments are what it remembers."""
