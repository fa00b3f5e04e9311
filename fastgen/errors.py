"""The one exception for a user's mistake: the command line prints its message on one line and exits with 2."""

# How torch says that memory ran out where it raises a plain RuntimeError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class UsageError(ValueError):
    """A bad argument or input file. The message names the argument and the way out."""
