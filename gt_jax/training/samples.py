"""samples.txt: what a run writes when it is asked to continue a text, every so many steps."""

import re
from pathlib import Path

from gt_jax.data.corpora import replace_file

_HEADER = re.compile(rb"^--- after (\d+) steps ---$", re.MULTILINE)


class Samples:
    """Appends samples to WORKDIR/samples.txt.

    Attributes:
        last: step of the newest sample, 0 without any.
    """

    def __init__(self, workdir: str | Path, *, start: int):
        """Samples of steps after `start` are dropped: a resumed run writes them again."""
        self._path = Path(workdir) / "samples.txt"
        written = self._path.read_bytes() if self._path.exists() else b""
        headers = [(int(header[1]), header.start()) for header in _HEADER.finditer(written)]
        later = [place for step, place in headers if step > start]
        self.last = max((step for step, _ in headers if step <= start), default=0)
        if later:
            replace_file(self._path, written[: later[0]])

    def write(self, step: int, text: str) -> None:
        """Keep a sample; what UTF-8 has no bytes for is escaped."""
        whole = f"--- after {step} steps ---\n{text}\n\n"
        with self._path.open("ab") as file:
            file.write(whole.encode("utf-8", "backslashreplace"))
        self.last = step
