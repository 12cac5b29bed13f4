"""Text from token ids that arrive a few at a time.

The result equals decoding all ids at once, whichever bursts they arrive in. A token is decoded with
the tokens before it, and bytes become characters once no later byte can change them.
"""

import codecs
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from gt_jax.data.base import Tokenizer
from gt_jax.data.hugging_face import clean_up

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_UNCOUNTED = -1  # characters of the window's text are counted once they are needed


class TextOut:
    """Decodes what follows some ids and looks for the strings that end it.

    stopped: True once a stop string is complete; nothing can be added then.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int], stop: Iterable[str] = ()):
        """Args: before: ids the text follows; stop: strings that end it, none empty."""
        self._reader = _Reader(tokenizer, before)
        self._stops = [_Stop(text) for text in stop]
        self._matched = self._settled = [0] * len(self._stops)  # after all text, after settled text
        self._held = deque()  # settled text not shown yet
        self._open = ""  # text that a later token may still change
        self._shown = self._length = 0  # characters shown, characters settled
        self.stopped = False

    def add(self, ids: Iterable[int]) -> tuple[str, int]:
        """The text that ids add, and how many of them were used.

        Characters that later ids may change are held back, and so is a possible beginning of a stop
        string. As soon as the text holds a stop string, the text ends before it; if it holds
        several, before the one that begins first.
        """
        ids = [int(i) for i in ids]
        if self._stops and len(ids) > 1:
            saved = self._reader.save()
            events = self._reader.read(ids)
            if self._search(events)[0] is None:
                return self._take(events), len(ids)
            self._reader.restore(saved)  # rare: find out with which of them
            shown = ""
            for used, i in enumerate(ids, start=1):
                shown += self.add([i])[0]
                if self.stopped:
                    return shown, used
        return self._take(self._reader.read(ids)), len(ids)

    def end(self) -> str:
        """The text that was held back; call it after the last ids."""
        if self.stopped:
            return ""
        shown = self._take(self._reader.end())
        return shown if self.stopped else shown + self._show(self._length - self._shown)

    def _search(self, events):
        """(where the first match begins or None, states after all text, after settled text)."""
        matched, settled, length, opened = self._matched, self._settled, self._length, self._open
        starts = []
        for is_open, text in events:
            if not is_open and text == opened:
                settled, opened, length = matched, "", length + len(text)
                continue
            if not is_open and opened:  # It changed after all.
                matched, opened = settled, ""
            at = length + len(opened)
            found = [s.feed(state, text) for s, state in zip(self._stops, matched)]
            starts += [at + end - len(s.text) for s, (_, end) in zip(self._stops, found) if end]
            matched = [state for state, _ in found]
            if is_open:
                opened += text
            else:
                settled, length = matched, length + len(text)
        return min(starts, default=None), matched, settled

    def _take(self, events):
        """Text to show once some events are dealt with."""
        if not self._stops:
            return "".join([text for is_open, text in events if not is_open])
        start, self._matched, self._settled = self._search(events)
        for is_open, text in events:
            if is_open:
                self._open += text
                continue
            self._open = ""
            self._held.append(text)
            self._length += len(text)
        if start is not None:
            self.stopped = True
            self._held.append(self._open)
            return self._show(start - self._shown)
        return self._show(self._length - max(self._settled, default=0) - self._shown)

    def _show(self, count):
        """The next so many characters of what is held."""
        self._shown += max(count, 0)
        shown = []
        while count > 0:
            text = self._held.popleft()
            shown.append(text[:count])
            if len(text) > count:
                self._held.appendleft(text[count:])
            count -= len(text)
        return "".join(shown)


class _Stop:
    """Knuth, Morris and Pratt's search for one string: every character is looked at once or twice.

    borders[n]: length of the longest proper beginning of text[:n] that also ends it; as far as
    was needed.
    """

    def __init__(self, text):
        self.text, self.borders = text, [0, 0]

    def feed(self, state, text):
        """(characters matched after `text`, where in `text` the string ends or None)."""
        wanted, borders, at = self.text, self.borders, 0
        if state == len(wanted):
            return state, None  # found before
        while at < len(text):
            if state == 0:
                at = text.find(wanted[0], at)
                if at < 0:
                    return 0, None
            while state and wanted[state] != text[at]:
                state = borders[state]
            state += wanted[state] == text[at]
            at += 1
            if state == len(wanted):
                return state, at
            if state == len(borders):
                border = borders[-1]
                while border and wanted[border] != wanted[state - 1]:
                    border = borders[border]
                borders.append(border + (wanted[border] == wanted[state - 1]))
        return state, None


class _Reader:
    """Decodes ids in order; `read` and `end` give events (is_open, text).

    The text of an open event may still change. The next event that is not open repeats it in its
    final form.

    A tokenizer says with `byte_errors` how its byte tokens, those with `token_bytes`, join:
    "replace" and "each" as `bytes.decode` does, with U+FFFD for a broken sequence or for each of
    its bytes; "whole": a run of bytes that is not UTF-8 becomes U+FFFD throughout, so that it is
    open to its end; None: it has none. Of other tokenizers, whose `decode` is all there is, up to
    three U+FFFD at the end are taken for a character that is not complete.
    """

    def __init__(self, tokenizer, before):
        self._decode = getattr(tokenizer, "decode_as_is", tokenizer.decode)
        self._bytes: Callable[[int], bytes | None] = getattr(
            tokenizer, "token_bytes", lambda i: None
        )
        self._errors: Any = getattr(tokenizer, "byte_errors", "unknown")
        self._has_bytes = self._errors not in (None, "unknown")
        self._cleans = getattr(tokenizer, "cleans_up", False)
        self._joins = getattr(tokenizer, "joins", True)
        self._window, self._done = [], 0  # the last ids, and characters of their text dealt with
        self._since = []  # ids since a character last ended, where that has to be found out
        self._pending = b""  # start of a character
        self._waiting = []  # of "each": tokens of the start of a character
        self._run, self._broken, self._known = [], False, 0  # of "whole"
        self._unclean, self._cleaned = "", 0  # text to clean, characters of it dealt with
        if not self._joins:
            return  # nothing depends on what is before
        before = [int(i) for i in before]
        if self._errors is None and not self._cleans:
            self._window_of(before)
            return
        if self._errors == "whole":
            before = self._without_half_character(before)
        self.read(before)
        if self._run:
            half = 0 if self._broken else len(self._pending)
            known = [*self._window, *self._run[: len(self._run) - half]]
            self._known = len(self._decode(known)) - self._done
        if self._cleans:
            self._cleaned = len(clean_up(self._unclean))

    def save(self):
        return vars(self) | {"_run": (self._run, len(self._run))}

    def restore(self, saved):
        run, length = saved["_run"]
        del run[length:]
        vars(self).update(saved | {"_run": run})

    def read(self, ids):
        if not self._joins:
            return [(False, self._decode(ids))]
        if self._errors == "each":
            return [(False, self._whole_characters(ids))]
        events = []
        if not self._has_bytes:
            events.append((False, self._text(ids)))
            ids = []
        for has_bytes, group in itertools.groupby(ids, lambda i: self._bytes(i) is not None):
            group = list(group)
            if not has_bytes:
                events += self._flush()
                events.append((False, self._text(group)))
            elif self._errors == "whole":
                events += self._lengthen_run(group)
            else:
                data = self._pending + self._joined(group)
                text, used = codecs.utf_8_decode(data, self._errors, False)
                self._pending = data[used:]
                self._window, self._done = group, _UNCOUNTED
                events.append((False, text))
        return self._clean(events) if self._cleans else events

    def end(self):
        events = self._flush()
        if self._errors == "unknown":
            events.append((False, self._decode(self._window)[self._done :]))
        if self._cleans:
            events = self._clean(events)
            events.append((False, clean_up(self._unclean)[self._cleaned :]))
        return events

    def _whole_characters(self, ids):
        """What ids of "each" add, whose byte tokens are of one byte, less a character's start."""
        ids = [*self._waiting, *ids]
        ready = len(ids)
        for count in (1, 2, 3):
            data = self._joined(ids[-count:])
            if len(data) < count or count > len(ids):
                break
            try:
                if codecs.utf_8_decode(data, "strict", False)[1] == 0:
                    ready = len(ids) - count
            except UnicodeDecodeError:
                pass  # it begins within a character, or is none
        self._waiting = ids[ready:]
        ids = [*self._window, *ids[:ready]]
        new = self._decode(ids)[self._done :]
        self._window_of(ids)
        return new

    def _joined(self, ids) -> bytes:
        """The bytes of tokens that have some."""
        return b"".join(self._bytes(i) or b"" for i in ids)

    def _flush(self):
        """The events of the end of a run of bytes."""
        if self._waiting:
            ids, self._waiting = [*self._window, *self._waiting], []
            return [(False, self._decode(ids)[self._done :])]
        if self._run:
            run, known, self._run = self._run, self._known, []
            self._pending, self._broken, self._known = b"", False, 0
            text = self._decode([*self._window, *run])[self._done + known :]
            self._window_of([*self._window, *run])
            return [(False, text)]
        if self._pending:
            text, _ = codecs.utf_8_decode(self._pending, self._errors, True)
            self._pending = b""
            return [(False, text)]
        return []

    def _lengthen_run(self, ids):
        """The events of more bytes of a run."""
        if not self._run and self._window and self._bytes(self._window[-1]):
            self._window, self._done = [], 0  # the half character at the context's beginning
        self._run.extend(ids)
        data = self._pending + self._joined(ids)
        if self._broken:
            return []
        text = self._characters(data)
        self._pending = data[len(text.encode()) :]
        try:
            codecs.utf_8_decode(self._pending, "strict", False)
        except UnicodeDecodeError:
            self._broken = True
        return [(True, text)]

    @staticmethod
    def _characters(data):
        """The characters that data begins with."""
        try:
            return codecs.utf_8_decode(data, "strict", False)[0]
        except UnicodeDecodeError as error:
            return data[: error.start].decode()

    def _without_half_character(self, ids):
        """ids less what is left at their beginning of a character cut in two."""
        half = itertools.takewhile(lambda i: (self._bytes(i) or b"a")[0] & 0xC0 == 0x80, ids)
        count = len(list(itertools.islice(half, 3)))
        self._window_of(ids[:count])
        return ids[count:]

    def _text(self, ids):
        """What ids without bytes add."""
        if self._done == _UNCOUNTED:
            self._window_of(self._window)
        ids = [*self._window, *ids]
        text = self._decode(ids)
        if self._errors != "unknown":
            new = text[self._done :]
            self._window_of(ids)
            return new
        complete = max(len(text.rstrip(INCOMPLETE)), len(text) - 3)
        new = text[self._done : complete]
        self._since = self._since + ids[len(self._window) :]
        if complete == len(text) and self._decode(self._since):
            self._window, self._done, self._since = self._since, len(self._decode(self._since)), []
        else:
            self._window, self._done = ids, max(complete, self._done)
        return new

    def _window_of(self, ids):
        """Keep the last ids that have a text: what follows is decoded after them."""
        for count in range(1, len(ids) + 1):
            if text := self._decode(ids[-count:]):
                self._window, self._done = ids[-count:], len(text)
                return
        self._window, self._done = list(ids), 0

    def _clean(self, events):
        """Cleaned up to the last word, whose spaces the next characters may remove."""
        self._unclean += "".join(text for is_open, text in events if not is_open)
        cut = len(self._unclean)
        while (cut := self._unclean.rfind(" ", 0, cut)) > 0 and self._unclean[cut - 1] in "' ":
            pass
        if cut <= 0:
            return []
        text = clean_up(self._unclean[:cut])[self._cleaned :]
        self._unclean, self._cleaned = self._unclean[cut:], 0
        return [(False, text)]
