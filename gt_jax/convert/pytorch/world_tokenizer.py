"""RWKV's World vocabulary for transformers: of the byte strings that fit, the longest is taken.

    tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)

Written by gt_jax, whose WorldTokenizer gives the same ids and texts. MIT licence.
"""

import ast
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

END = "<|rwkv_tokenizer_end_of_text|>"  # id 0, which stands for no bytes
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class RwkvWorldTokenizer(PreTrainedTokenizer):
    """Tokens are byte strings; as text, transformers sees each byte as the character of its number.

    Id 0 begins, ends and pads a text. No text is encoded as it, its own name included.
    """

    vocab_files_names = {"vocab_file": "rwkv_vocab_v20230424.txt"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any):
        """vocab_file: lines of an id, a Python literal and its length in bytes."""
        self.vocab_file = vocab_file
        self._tokens = {0: END}
        for line in Path(vocab_file).read_text("utf-8").rstrip("\n").split("\n"):
            number, literal = line.rsplit(" ", 1)[0].split(" ", 1)
            token = ast.literal_eval(literal)
            token = token.encode() if isinstance(token, str) else token
            self._tokens[int(number)] = token.decode("latin-1")
        self._ids = {token: number for number, token in self._tokens.items()}
        lengths: dict[str, set[int]] = {}  # first two bytes -> those of the tokens that begin so
        for token in self._ids:
            if len(token) > 1 and token != END:
                lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
        options = {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
        super().__init__(**(special | options | kwargs))

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return max(self._tokens) + 1

    def get_vocab(self) -> dict[str, int]:
        """Token as text -> id."""
        return self._ids | self.get_added_vocab()

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        data, tokens, start = text.encode().decode("latin-1"), [], 0
        while start < len(data):
            lengths = self._lengths.get(data[start : start + 2], ())
            fitting = (data[start : start + length] for length in lengths)
            token = next((token for token in fitting if token in self._ids), data[start])
            if token not in self._ids:
                raise ValueError(f"the vocabulary has no token for byte {ord(token)}")
            tokens.append(token)
            start += len(token)
        return tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens.get(index, UNKNOWN)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; U+FFFD for unknown ids and for bytes that are no UTF-8."""
        of_others = {END: b"", UNKNOWN: UNKNOWN.encode()}
        data = [of_others[t] if t in of_others else t.encode("latin-1") for t in tokens]
        return b"".join(data).decode("utf-8", "replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copies the vocabulary file into a folder."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
