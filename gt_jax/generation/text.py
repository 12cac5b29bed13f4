"""Text out of token ids that come a few at a time."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
OVERLAP = 16  # ids decoded again before new ones: tokenizers join a token to its neighbours


class TextOut:
    """Decodes what follows some ids and looks for the strings that end it.

    stopped: True once a stop string is complete; nothing can be added then.
    """

    def __init__(self, tokenizer, before, stop=()):
        """Args: before: ids the text follows; stop: strings that end it."""
        self._decode = tokenizer.decode
        self._stop = stop
        self._ids = [int(i) for i in before][-OVERLAP:]
        self._done = self._complete()  # characters of the window's text dealt with
        self._held = ""  # text that may be the start of a stop string
        self.stopped = False

    def add(self, ids) -> tuple[str, int]:
        """The text that ids add, and how many of them it took.

        Held back are a character still incomplete and what may become a stop string. With the ids
        that complete a stop string, the text ends before that string.
        """
        window, done, held = self._ids, self._done, self._held
        self._ids = [*window, *ids]
        text = held + self._new_text()
        if not any(stop in text for stop in self._stop):
            self._held = text[len(text) - self._possible_stop(text) :]
            return text[: len(text) - len(self._held)], len(ids)
        if len(ids) == 1:
            self.stopped, self._held = True, ""
            return text[: min(text.find(s) for s in self._stop if s in text)], 1
        # Rare: find out with which of them.
        self._ids, self._done, self._held = window, done, held
        shown, used = "", 0
        while not self.stopped and used < len(ids):
            shown += self.add([ids[used]])[0]
            used += 1
        return shown, used

    def end(self) -> str:
        """What was held back, when no more ids will come."""
        if self.stopped:
            return ""
        return self._held + self._decode(self._ids)[self._done :]

    def _new_text(self):
        """Text of the window not yet dealt with; cuts a long window to its end."""
        text = self._decode(self._ids)
        complete = len(text.rstrip(INCOMPLETE))
        new = text[self._done : complete]
        self._done = max(complete, self._done)
        if len(self._ids) > 4 * OVERLAP and complete == len(text):
            self._ids = self._ids[-OVERLAP:]
            self._done = self._complete()
        return new

    def _complete(self):
        return len(self._decode(self._ids).rstrip(INCOMPLETE))

    def _possible_stop(self, text):
        """Length of the longest end of text that a stop string begins with."""
        return max(
            (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
