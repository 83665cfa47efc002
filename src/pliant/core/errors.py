"""Errors that a person reads."""


class UsageError(ValueError):
    """Something outside the library is wrong: an argument, a file, a stream.

    The message is one sentence: what was called, what arrived, what was expected, what to do.
    The command line prints it without a traceback and exits with code 2.
    """
