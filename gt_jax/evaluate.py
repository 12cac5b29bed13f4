"""Measure a trained or converted model on text.

    python -m gt_jax.evaluate --checkpoint=runs/gf_mh
    python -m gt_jax.evaluate --checkpoint=runs/gf_mh --source=book.txt
    python -m gt_jax.evaluate --checkpoint=runs/gpt2 --source=book.txt --seq_len=1024 --stride=256

Without --source, the program reads the validation split of the run's own text as in training. With
--source, it reads the whole text, of a source with splits of its own the validation split:
recurrent models carry their state to the end of each document, attention models read overlapping
windows. --seq_len or --stride asks for windows in any model.
"""

import functools

import jax
import numpy as np
from absl import flags as absl_flags

from gt_jax import checkpoint, cli, compilation, stored
from gt_jax.data import Corpus, count_tokens, encode_corpus, evaluation_batches, load_held_out
from gt_jax.data.base import Tokenizer
from gt_jax.errors import InputError
from gt_jax.finite import check_computed
from gt_jax.scoring import check_ids, loss_unit, score, windows
from gt_jax.training.evaluation import describe, evaluate, measures_of
from gt_jax.training.step import make_eval_step
from gt_jax.training.text import read_text


def encode_documents(
    documents: tuple[str, ...], tokenizer: Tokenizer, name: str
) -> tuple[np.ndarray, ...]:
    """Token ids [n] of each document, ended by the tokenizer's eos id where there are many.

    Raises:
        InputError: a text has no ids, or nothing to predict in it; the message begins with `name`.
    """
    try:
        tokens = encode_corpus(Corpus(name, documents, ()), tokenizer).train
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if not any(len(ids) > 1 for ids in tokens):
        raise InputError(f"{name} has fewer than 2 tokens in every document; name a longer text")
    return tuple(tokens)


def _as_trained(model, params, documents, train):
    """(nats, targets, description), reading text as the run's own evaluations do."""
    batches = evaluation_batches(
        documents,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        carry=train.carry_state,
    )
    carry = model.init_state(train.batch_size) if train.carry_state else None
    options = compilation.options(compilation.UNTIMED)
    step = jax.jit(make_eval_step(model), compiler_options=options)
    measured = evaluate(step, params, batches, carry=carry)
    start = "learned" if model.config.learned_states else "zero"
    how = f"windows of {train.seq_len}, each from the {start} state"
    if train.carry_state:
        how = f"{train.batch_size} tracks side by side, state carried along each"
    tokens = int(measured["validation_tokens"])
    return measured["validation_loss"] * tokens, tokens, how


def _scored(model, params, documents, *, batch_size, seq_len, stride):
    """(nats, targets, description), of whole documents or, if seq_len is set, of windows."""
    if seq_len is None:
        pairs = [(ids[:1], ids[1:]) for ids in documents if len(ids) > 1]
        how = f"{len(pairs)} document{'s' * (len(pairs) > 1)}, state carried to the end of each"
    else:
        pairs = windows(documents, seq_len=seq_len, stride=stride)
        how = f"windows of {seq_len}, one every {stride}"
    scores = score(model, params, pairs, batch_size=batch_size)
    nats = -sum(float(s.log_probs.sum(dtype=np.float64)) for s in scores)
    return nats, sum(len(s.log_probs) for s in scores), how


def _window(flags, model, train) -> tuple[int | None, int | None]:
    """(seq_len, stride) of the windows to read, None for none; InputError if they cannot be."""
    limit = model.config.position_limit
    if flags.seq_len is None and flags.stride is None and limit is None:
        return None, None
    seq_len = flags.seq_len or limit or (train.seq_len if train else 1024)
    stride = flags.stride or max(seq_len // 2, 1)
    if limit is not None and seq_len > limit:
        raise InputError(f"--seq_len={seq_len} exceeds the {limit} positions of this model")
    if stride > seq_len:
        raise InputError(f"--stride={stride} must be at most the window, --seq_len={seq_len}")
    return seq_len, stride


def main(argv: list[str]) -> None:
    flags = cli.new_flags()
    define = functools.partial(absl_flags.DEFINE_string, flag_values=flags)
    define("checkpoint", None, "A run, RUN@last, RUN@STEP, one folder, or a converted model.")
    define("source", None, "Other text, as data.source takes it: a file, for example.")
    define(
        "field",
        None,
        "The field that holds the text of a .jsonl or TFDS --source; default: the run's.",
    )
    define = functools.partial(absl_flags.DEFINE_integer, lower_bound=1, flag_values=flags)
    define("batch_size", 8, "Documents or windows read side by side; the result is the same.")
    define("seq_len", None, "Read in windows of this many tokens.")
    define("stride", None, "Tokens from one window to the next; default half of --seq_len.")
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint",)):
        return

    folder = checkpoint.find(flags.checkpoint)
    config = stored.run_config(folder, checkpoint.read_about(folder))
    if flags.source is None and config is None:
        raise InputError(
            f"--source is missing: {flags.checkpoint} is a converted model and has no text of its "
            "own; name a file"
        )
    model, params, tokenizer = checkpoint.load(flags.checkpoint, say=cli.note)
    train = config.train if config else None
    seq_len, stride = _window(flags, model, train)
    if flags.source is None and config is not None:
        name = config.data.source
        tokens = read_text(config, tokenizer=tokenizer).tokens.validation
        documents = (tokenizer.decode(ids) for ids in tokens)
    else:
        assert flags.source is not None, "a converted model without --source was refused above"
        name = flags.source
        field = flags.field or (config.data.field if config else "text")
        documents = load_held_out(name, field, name="--source")
        tokens = encode_documents(documents, tokenizer, name)
    check_ids(model, tokens)

    if flags.source is None and flags.seq_len is None and flags.stride is None:
        nats, targets, how = _as_trained(model, params, tokens, train)
    else:
        nats, targets, how = _scored(
            model, params, tokens, batch_size=flags.batch_size, seq_len=seq_len, stride=stride
        )
    check_computed(nats)
    count = count_tokens(tokens)
    sizes = [(len(text), len(text.encode("utf-8", "surrogatepass"))) for text in documents]
    characters, data = (sum(column) for column in zip(*sizes))
    measured = measures_of(nats / targets, targets, characters / count, data / count)
    if tokenizer.kind == "ids":  # Text is numbers here, and their digits mean nothing.
        del measured["bits_per_character"], measured["bits_per_byte"]
    print(f"{name}: {describe(measured, loss_unit(tokenizer))}")
    print(f"{targets:,} tokens in {how}")


if __name__ == "__main__":
    cli.run(main)
