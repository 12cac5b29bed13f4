"""Prompts as token ids."""

import numpy as np

from gt_jax.data.base import Tokenizer
from gt_jax.errors import InputError
from gt_jax.generation.checks import brief, check_surrogates


def encode_prompt(
    tokenizer: Tokenizer, text: str, name: str, *, after: str | None = None
) -> np.ndarray:
    """Token ids [T] of a prompt, int32.

    Args:
        tokenizer, text: the prompt.
        name: of the prompt in messages.
        after: the text that it continues; None for the first, which begins with the tokenizer's
            start_ids.

    Raises:
        InputError: it holds characters that the vocabulary lacks, or half of a surrogate pair;
            `name` is what the message calls it.
    """
    check_surrogates(name, text)
    try:
        if after is None:
            ids, start = tokenizer.encode(text), list(tokenizer.start_ids)
            begun = ids[: len(start)].tolist() == start
            ids = ids if begun else np.array([*start, *ids], np.int32)
        else:
            ids = tokenizer.encode_after(text, after)
    except InputError as error:
        raise InputError(f"{name}={brief(text)}: {error}") from error
    if tokenizer.kind.startswith("char"):
        unknown = sorted(set(text) - set(tokenizer.decode(ids)))
        if unknown:
            raise InputError(
                f"{name}={brief(text)} has characters outside the vocabulary: {brief(unknown)}"
            )
    return ids
