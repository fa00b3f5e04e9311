"""The one exception for a user's mistake: the command line prints its message on one line and exits with 2."""


class UsageError(ValueError):
    """A bad argument or input file. The message names the argument and the way out."""
