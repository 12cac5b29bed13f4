"""Prompts as token ids."""

import numpy as np

from gt_jax.errors import InputError
from gt_jax.generation.checks import brief, check_surrogates


def encode_prompt(tokenizer, text: str, name: str) -> np.ndarray:
    """Token ids [T] of a prompt.

    Raises:
        InputError: it holds characters that the vocabulary lacks, or half of a surrogate pair;
            `name` is what the message calls it.
    """
    check_surrogates(name, text)
    try:
        ids = tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"{name}={brief(text)}: {error}") from error
    if tokenizer.kind.startswith("char"):
        unknown = sorted(set(text) - set(tokenizer.decode(ids)))
        if unknown:
            raise InputError(
                f"{name}={brief(text)} has characters outside the vocabulary: {brief(unknown)}"
            )
    return ids
