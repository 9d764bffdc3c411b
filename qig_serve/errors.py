"""The one exception that the command line turns into a sentence and exit status 2."""


class UserError(Exception):
    """Something the user can correct: says what is wrong, where, and what to do."""
