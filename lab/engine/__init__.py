"""Turns of generators in one thread: what `lab chat` and `lab serve` answer with."""
