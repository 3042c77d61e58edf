"""`lab exp` and `lab promote`: compare experiments, and make one the new default.

`table` shows them; `promote` brings one's results, and `edits` writes its parameters into conf/.
"""
