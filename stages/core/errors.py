"""The one exception that a user's mistake ends in: its text says what is wrong and what to do."""


class UserError(Exception):
    """Something the user can put right. Stages and commands print its text in one line and exit 1."""
