"""Tokenizers that come with published models, in the form of `gt_jax.data.tokenizers`."""

import ast
import base64
import contextlib
import zlib

import numpy as np

from gt_jax.errors import InputError, one_line

# The World vocabulary has 65,536 tokens of up to 128 bytes, in 1 MB of text.
LARGEST_VOCABULARY = 1 << 24  # ids
LARGEST_TEXT = 1 << 25  # bytes
LONGEST_LINE = 1 << 14  # characters


class WorldTokenizer:
    """RWKV's World vocabulary: byte strings, of which the longest that fits is taken."""

    kind = "rwkv-world"
    eos_id = 0

    def __init__(self, vocabulary):
        """Args: vocabulary: `pack` of the file's text, whose lines are id, Python literal, length.

        Raises:
            InputError: a line is not of this form, or the packed text is damaged or too large.
        """
        self._packed = vocabulary
        self._bytes = {0: b""}
        for line in self.text.rstrip("\n").split("\n"):
            try:
                if len(line) > LONGEST_LINE:
                    raise ValueError("too long")
                number, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else token
                if not isinstance(token, bytes) or not 0 <= int(number) < LARGEST_VOCABULARY:
                    raise ValueError("neither text nor bytes, or an id out of range")
                self._bytes[int(number)] = token
                length = int(length)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                raise InputError(f"{line[:80]!r} is no line of an RWKV vocabulary") from error
            if len(token) != length:
                raise InputError(f"{line[:80]!r} has {len(token)} bytes, not {length}")
        self.vocab_size = max(self._bytes) + 1
        self._ids = {token: number for number, token in self._bytes.items() if token}
        # First byte -> lengths of its tokens, longest first.
        self._lengths = [set() for _ in range(256)]
        for token in self._ids:
            self._lengths[token[0]].add(len(token))
        self._lengths = [sorted(lengths, reverse=True) for lengths in self._lengths]

    @staticmethod
    def pack(text):
        """The text of a vocabulary file as JSON holds it in half the room."""
        return base64.b64encode(zlib.compress(text.encode())).decode()

    @property
    def text(self):
        """The vocabulary file."""
        unpack = zlib.decompressobj()
        try:
            text = unpack.decompress(base64.b64decode(self._packed), LARGEST_TEXT)
            if not unpack.eof:
                raise ValueError(f"it ends early or has more than {LARGEST_TEXT:,} bytes")
            return text.decode()
        except (zlib.error, ValueError, TypeError) as error:
            raise InputError(f"the packed vocabulary is damaged ({one_line(error)})") from error

    def encode(self, text):
        """[n] int32 ids."""
        data = text.encode("utf-8", "surrogatepass")
        ids, start = [], 0
        while start < len(data):
            for length in self._lengths[data[start]]:
                number = self._ids.get(data[start : start + length])
                if number is not None:
                    break
            else:
                raise InputError(f"the vocabulary has no token for byte {data[start]}")
            ids.append(number)
            start += length
        return np.array(ids, np.int32)

    def decode(self, ids):
        """Text of integer ids; U+FFFD for an unknown id and for bytes that are no UTF-8."""
        unknown = "\N{REPLACEMENT CHARACTER}".encode()
        ids = np.asarray(ids).ravel().tolist()
        return b"".join(self._bytes.get(i, unknown) for i in ids).decode("utf-8", "replace")

    def to_dict(self):
        return {"kind": self.kind, "vocabulary": self._packed}


@contextlib.contextmanager
def _one_line(fault: str):
    """InputError for what the tokenizers package raises: bare Exceptions, and panics beside them.

    A panic is no Exception but a BaseException of a class that cannot be imported.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"tokenizer.json {fault} ({one_line(error)})") from error


class HuggingFaceTokenizer:
    """What a tokenizer.json of the tokenizers package says. Special tokens are never added."""

    kind = "huggingface"
    eos_id = None

    def __init__(self, json):
        """Args: json: the text of tokenizer.json.

        Raises:
            InputError: the package is missing, or cannot read the text.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise InputError("tokenizer.json needs a package: pip install tokenizers") from error
        with _one_line("cannot be read"):
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
            # Of a training run; a padding of 2^62 tokens would end the process.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self.text = json
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, text):
        """[n] int32 ids."""
        with _one_line("cannot encode this text"):
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids):
        ids = np.asarray(ids).ravel().tolist()
        with _one_line("cannot decode these ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def to_dict(self):
        return {"kind": self.kind, "json": self.text}


class IdTokenizer:
    """For a model without its tokenizer: text is ids in decimal, such as "17 4 2"."""

    kind = "ids"
    eos_id = None

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        """[n] int32 ids. Raises InputError if the text is no list of ids below vocab_size."""
        words = text.split()
        if not all(word.isdecimal() and int(word) < self.vocab_size for word in words):
            raise InputError(
                f"this model has no tokenizer: write ids from 0 to {self.vocab_size - 1}, "
                'such as "17 4 2", or convert it again with --tokenizer=FILE'
            )
        return np.array(list(map(int, words)), np.int32)

    def decode(self, ids):
        return " ".join(map(str, np.asarray(ids).ravel().tolist()))

    def to_dict(self):
        return {"kind": self.kind, "vocab_size": self.vocab_size}


PRETRAINED = {t.kind: t for t in (WorldTokenizer, HuggingFaceTokenizer, IdTokenizer)}
