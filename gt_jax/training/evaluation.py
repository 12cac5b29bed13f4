"""The loss of a model on held-out batches, in every unit, and as one line of text."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from gt_jax.data import Batch
from gt_jax.models import Params


def evaluate(
    eval_step: Callable,
    params: Params,
    batches: Iterable[Batch],
    *,
    carry: Any = None,
    per_token: float = 1.0,
) -> dict[str, float]:
    """Mean cross-entropy over every counted target of some batches.

    Args:
        eval_step: from `gt_jax.training.step.make_eval_step`, compiled.
        params: float32 parameters.
        batches: of `gt_jax.data.evaluation_batches`.
        carry: the zero state if rows continue from batch to batch, else None.
        per_token: characters per token, see `characters_per_token`.

    Returns:
        validation_loss (nats per token), bits_per_token, bits_per_character, perplexity (of a
        token), validation_tokens.
    """
    sums = []
    for batch in batches:
        result, carry = eval_step(params, batch, carry)
        sums.append(result)  # Fetched together at the end: the device is never waited for.
    sums = jax.device_get(sums)
    tokens = sum(int(s.tokens) for s in sums)
    return measures_of(sum(float(s.loss) for s in sums) / tokens, tokens, per_token)


def describe(measured: dict[str, float], unit: str) -> str:
    """One line for people; `unit` is "character" or "token"."""
    parts = [f"loss {measured['validation_loss']:.4f} nats/{unit}"]
    if unit == "token":
        parts.append(f"{measured['bits_per_token']:.4f} bits/token")
    for name in ("character", "byte"):
        if f"bits_per_{name}" in measured:
            parts.append(f"{measured[f'bits_per_{name}']:.4f} bits/{name}")
    return ", ".join([*parts, f"perplexity {measured['perplexity']:.3f}"])


def measures_of(
    loss: float, tokens: int, per_token: float, bytes_per_token: float | None = None
) -> dict[str, float]:
    """What `evaluate` returns, and bits_per_byte if bytes_per_token is given.

    Args:
        loss: mean nats per token.
        tokens: how many were counted.
        per_token, bytes_per_token: characters and UTF-8 bytes per token.
    """
    bits = loss / math.log(2)
    return {
        "validation_loss": loss,
        "bits_per_token": bits,
        "bits_per_character": bits / per_token,
        **({"bits_per_byte": bits / bytes_per_token} if bytes_per_token else {}),
        "perplexity": math.exp(min(loss, 700)),
        "validation_tokens": tokens,
    }
