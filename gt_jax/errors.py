"""The one exception for mistakes in what the user gave."""


class InputError(ValueError):
    """A user's mistake: the message is one line naming the field, its value and the mend.

    Command-line programs print it as `error: ...` and exit with status 1, without a traceback.
    """
