"""Measure a trained model on text it has not seen.

    python -m gt_jax.evaluate --checkpoint=runs/gf_mh
    python -m gt_jax.evaluate --checkpoint=runs/gf_mh --source=book.txt

Without --source: the validation split of the run's own text. With it: the whole of that text.
"""

import functools
import math

import jax
from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.config import from_config_dict
from gt_jax.data import encode_corpus, evaluation_batches, load_corpus
from gt_jax.training import checkpoint
from gt_jax.training.step import make_eval_step
from gt_jax.training.text import characters_per_token, loss_unit, read_text


def evaluate(eval_step, params, batches, *, carry=None, per_token=1.0) -> dict[str, float]:
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
    loss = sum(float(s.loss) for s in sums) / tokens
    return {
        "validation_loss": loss,
        "bits_per_token": loss / math.log(2),
        "bits_per_character": loss / math.log(2) / per_token,
        "perplexity": math.exp(min(loss, 700)),
        "validation_tokens": tokens,
    }


def describe(measured: dict[str, float], unit: str) -> str:
    """One line for people; `unit` is "character" or "token"."""
    per_token = f"{measured['bits_per_token']:.4f} bits/token, " if unit == "token" else ""
    return (
        f"loss {measured['validation_loss']:.4f} nats/{unit}, {per_token}"
        f"{measured['bits_per_character']:.4f} bits/character, "
        f"perplexity {measured['perplexity']:.3f}"
    )


def main(argv):
    flags = cli.new_flags()
    define = functools.partial(absl_flags.DEFINE_string, flag_values=flags)
    define("checkpoint", None, "A run's workdir, or one checkpoint folder.")
    define("source", None, "Other text: as data.source, e.g. a file.")
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint",)):
        return

    model, params, tokenizer = checkpoint.load(flags.checkpoint)
    config = from_config_dict(checkpoint.read_about(checkpoint.find(flags.checkpoint))["config"])
    if flags.source is None:
        name, documents = (
            config.data.source,
            read_text(config, tokenizer=tokenizer).tokens.validation,
        )
    else:
        corpus = load_corpus(flags.source, field=config.data.field)
        tokens = encode_corpus(corpus, tokenizer)
        name, documents = corpus.name, tokens.train + tokens.validation

    train = config.train
    batches = evaluation_batches(
        documents,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        carry=train.carry_state,
    )
    measured = evaluate(
        jax.jit(make_eval_step(model)),
        params,
        batches,
        carry=model.init_state(train.batch_size) if train.carry_state else None,
        per_token=characters_per_token(tokenizer, documents),
    )
    print(f"{name}: {describe(measured, loss_unit(tokenizer))}")
    print(f"{measured['validation_tokens']:,} tokens, in windows of {train.seq_len}")


if __name__ == "__main__":
    cli.run(main)
