"""The ways in which a command ends early."""


class UserError(ValueError):
    """Bad input, with one message that says what was found, what was expected and how to mend it.

    The command line scripts print it without a traceback; any other exception is a bug and keeps its own.
    """


class Interrupted(Exception):
    """A run was stopped by a signal, after its state was saved."""
