"""The one exception for mistakes in what the user gave, and a hint at misspelt names."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A user's mistake: the message is one line naming the field, its value and the mend.

    Command-line programs print it as `error: ...` and exit with status 1, without a traceback.
    """


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` to end a message with if a known name is close to this one, else ""."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(text: object, limit: int = 300) -> str:
    """What a file or an exception says, as a message can quote it: one short line, printable."""
    words = " ".join(str(text)[: 4 * limit].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return line if len(line) <= limit else f"{line[:limit]}..."
