"""Parallel RWKV-6 and Mamba-2 hybrid language models in JAX."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gt_jax.starting import end_at_ctrl_c

if TYPE_CHECKING:  # `import gt_jax` alone stays quick
    from gt_jax.data.base import Tokenizer
    from gt_jax.models import LanguageModel, Params

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m gt_jax.PROGRAM` looks for the program
    end_at_ctrl_c()


def load(path: str | Path) -> "tuple[LanguageModel, Params, Tokenizer]":
    """A trained model, ready to apply.

        model, params, tokenizer = gt_jax.load("runs/gf_mh")
        output = model.apply({"params": params}, tokenizer.encode("ROMEO:")[None])
        output.logits  # [1, 6, vocab] float32

    Args:
        path: a run's workdir (its best checkpoint), RUN@last, RUN@500, RUN@400+500 (the mean of the
            two), one checkpoint folder or a converted model.

    Returns:
        (model, params, tokenizer).

    Raises:
        gt_jax.errors.InputError: there is no checkpoint at `path`, or it is damaged.
    """
    from gt_jax.checkpoint import load as load_checkpoint

    return load_checkpoint(path)
