"""The one exception for mistakes of the user, and hints at misspelt names."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A user's mistake: the message is one line that names the field, the value and the fix.

    Command-line programs print it as `error: ...` and exit with status 1, without a traceback.
    """


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message, `; did you mean 'x'?`; "" if no known name is close to this one."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(text: object, limit: int = 300) -> str:
    """Text of a file or an exception in a form that a message can quote: one short line."""
    words = " ".join(str(text)[: 4 * limit].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return line if len(line) <= limit else f"{line[:limit]}..."
