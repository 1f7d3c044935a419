"""The error that a user can mend."""


class UserError(ValueError):
    """Bad input, with one message that says what was found, what was expected and how to mend it.

    The command line scripts print it without a traceback; any other exception is a bug and keeps its own.
    """
