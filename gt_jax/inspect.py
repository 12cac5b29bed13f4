"""Look inside a trained model: one HTML page that shows a text as the model read it.

    python -m gt_jax.inspect --checkpoint=runs/gf_mh --text="ROMEO: But soft, what light"
    python -m gt_jax.inspect --checkpoint=runs/gf_mh --file=play.txt --out=play.html

The text is coloured by loss, by the gate, by what each branch contributes and by how far the
branches agree, for each layer; below it, the memories' norms over time. The page needs no network.
"""

import functools
import importlib.resources
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags

from gt_jax import analysis, checkpoint, cli
from gt_jax.data.base import Tokenizer
from gt_jax.data.files import small
from gt_jax.errors import InputError
from gt_jax.models import LanguageModel, ModelConfig, count_parameters
from gt_jax.scoring import loss_unit

PLACES = 12  # of least agreement, at least APART tokens from each other
APART = 8


def page(
    trace: analysis.Trace,
    ids: Sequence[int] | np.ndarray,
    *,
    config: ModelConfig,
    tokenizer: Tokenizer,
    checkpoint: str,
    notes: Sequence[str] = (),
) -> str:
    """The HTML page of a text.

    Args:
        trace: of `gt_jax.analysis.trace`.
        ids: [T] the tokens it read.
        config: the model's ModelConfig.
        tokenizer: the model's.
        checkpoint: its name, for the title.
        notes: sentences to show above the text.
    """
    with_mean = {
        name: np.concatenate([x.mean(axis=0, keepdims=True), x]) for name, x in trace.blocks.items()
    }
    cosine = with_mean.get("cosine", [])
    spellings = [
        [[tokenizer.decode([i]), float(f"{p:.3g}")] for i, p in zip(tokens, chances)]
        for tokens, chances in zip(trace.guesses.tolist(), trace.chances.tolist())
    ]
    data = {
        "checkpoint": checkpoint,
        "model": f"{checkpoint}: {describe(config)}",
        "notes": list(notes),
        "summary": summarise(trace, ids, tokenizer),
        "layers": config.layers,
        "vocab_size": config.vocab_size,
        "blind_loss": math.log(config.vocab_size),
        "constant_gate": "gate" in with_mean and bool(np.ptp(with_mean["gate"], axis=1).max() == 0),
        "tokens": spell(tokenizer, ids),
        "guesses": spellings,
        "measures": {"loss": [plain(trace.loss)]} | {n: plain(x) for n, x in with_mean.items()},
        "places": [analysis.lowest_places(row, count=PLACES, apart=APART) for row in cosine],
        "states": {part: plain(norms) for part, norms in trace.states.items()},
        "stride": trace.stride,
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    template = importlib.resources.files("gt_jax").joinpath("inspect.html").read_text("utf-8")
    # No text can end the element that holds it.
    return template.replace("DATA", text.replace("<", "\\u003c"), 1)


def describe(config: ModelConfig) -> str:
    """A line that says what model this is."""
    kind = config.architecture
    if kind == "hybrid":
        branch = "" if config.branch == "official" else f" with the {config.branch} RWKV branch"
        kind = f"hybrid of {config.branches}, fusion {config.fusion}{branch}"
    size = count_parameters(config)["total"]
    return f"{kind}, {config.layers} layers of width {config.dim}, {size:,} parameters"


def summarise(trace: analysis.Trace, ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    """A line of averages over the text."""
    loss = float(np.nanmean(trace.loss))
    return f"{len(ids):,} tokens, loss {loss:.4f} nats/{loss_unit(tokenizer)}"


def spell(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text that each token adds: [T] strings that join to the whole text.

    Where a character takes several tokens, it belongs to the last one; the others are empty.
    """
    spelt, start, shown = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            spelt.append("")
            continue
        spelt.append(text[len(shown) :])
        # The next is spelt after this one: some tokenizers drop a space in front of a text.
        start, shown = end - 1, tokenizer.decode(ids[end - 1 : end])
    return spelt


def plain(values: Any) -> list | float | None:
    """An array as nested lists of numbers with four digits, None for what is not finite."""
    if np.ndim(values):
        return [plain(value) for value in values]
    return float(f"{values:.4g}") if math.isfinite(values) else None


def read_text(flags: absl_flags.FlagValues) -> tuple[str, str]:
    """The text that --text or --file gives, and which of them did.

    Raises:
        InputError: neither or both are given, the file cannot be read, or the text is empty.
    """
    if (flags.text is None) == (flags.file is None):
        raise InputError("give a text, either as --text=TEXT or as --file=FILE; see --help")
    if flags.file is None:
        name, text = "--text", flags.text
    else:
        name = f"--file={flags.file}"
        try:
            text = small(Path(flags.file)).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 text; convert it first") from error
        except OSError as error:
            raise InputError(f"{name} cannot be read ({error.strerror})") from error
    if not text:
        raise InputError(f"{name} is empty; give at least two tokens of text")
    return name, text


def cut(
    ids: Sequence[int] | np.ndarray, model: LanguageModel, max_tokens: int
) -> tuple[Sequence[int] | np.ndarray, str]:
    """The ids to show, and a sentence on what was left out ("" if nothing)."""
    kept = min(max_tokens, model.config.position_limit or max_tokens)
    if len(ids) <= kept:
        return ids, ""
    reason = f"--max_tokens={max_tokens}" if kept == max_tokens else "the positions this model has"
    return ids[:kept], f"The first {kept:,} of the text's {len(ids):,} tokens ({reason})."


def default_out(checkpoint: str | Path) -> Path:
    """inspect.html in the folder of the run that a checkpoint belongs to, else in this folder."""
    folder = Path(checkpoint)
    for run in (folder, folder.parent.parent):
        if (run / "checkpoints").is_dir():
            return run / "inspect.html"
    return Path("inspect.html")


def main(argv: list[str]) -> None:
    flags = cli.new_flags()
    define = functools.partial(absl_flags.DEFINE_string, flag_values=flags)
    define(
        "checkpoint",
        None,
        "RUN (its best), RUN@last, RUN@STEP, the mean RUN@STEP+STEP, or a folder.",
    )
    define("text", None, "The text to look at.")
    define("file", None, "A UTF-8 file that holds the text.")
    define("out", None, "The page to write; default inspect.html in the run's folder, else here.")
    absl_flags.DEFINE_integer(
        "max_tokens", 4096, "Read at most this many tokens.", flag_values=flags
    )
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint",)):
        return
    name, text = read_text(flags)
    if flags.max_tokens < 2:
        raise InputError(f"--max_tokens={flags.max_tokens} must be at least 2")

    model, params, tokenizer = checkpoint.load(flags.checkpoint, say=cli.note)
    try:
        ids = tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if len(ids) < 2:
        raise InputError(f"{name} must be at least two tokens long, not {len(ids)}")
    ids, left_out = cut(ids, model, flags.max_tokens)
    trace = analysis.trace(model, params, ids)
    notes = [left_out] if left_out else []
    if not trace.blocks:
        notes.append("A block of this model has one branch: there is no gate and no share to show.")
    elif model.config.branches != "rwkv+mamba":
        notes.append(
            f"The branches of this model are {model.config.branches}: what is called RWKV's is the "
            "first one's here, what is called Mamba's the second's."
        )
    elif model.config.branch == "legacy" and model.config.legacy_wkv != "c":
        notes.append(
            "The legacy RWKV branch gives back its input with what it adds: both count as its "
            "contribution here."
        )
    html = page(
        trace,
        ids,
        config=model.config,
        tokenizer=tokenizer,
        checkpoint=flags.checkpoint,
        notes=notes,
    )
    out = Path(flags.out or default_out(checkpoint.split_name(flags.checkpoint)[0]))
    out.write_text(html, encoding="utf-8")
    print(f"{out}: {summarise(trace, ids, tokenizer)}", *notes, sep="\n")


if __name__ == "__main__":
    cli.run(main)
