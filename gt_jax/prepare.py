"""Turn text of any size into token shards on disk, which training reads without loading them.

    python -m gt_jax.prepare SRC DST
    python -m gt_jax.prepare SRC DST --train_tokenizer=bpe --vocab_size=16384
    python -m gt_jax.prepare SRC DST --tokenizer=tokenizer.json
    python -m gt_jax.prepare --check DST
    python -m gt_jax.train --config=gf_mh --config.data.source=DST

SRC: .txt or .jsonl, packed or not (.gz, .zst, .bz2, .xz), .parquet, a folder of these, a folder
that Hugging Face's datasets saved, or shakespeare-all. Files or folders named train, valid and test
are those splits; test is left out. A .txt is one document, and so is a line of .jsonl and a row of
a table.

Interrupted, even by kill -9? Run the same command again: it continues, and the bytes it ends with
are the same. What cannot be read is skipped and counted; a damaged file stops it.
"""

import contextlib
import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from absl import flags as absl_flags
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Worker processes import this module again: nothing at its top may load JAX.
from gt_jax.data.base import Tokenizer
from gt_jax.data.learned import LEARNED, train_tokenizer
from gt_jax.data.preparing import prepare
from gt_jax.data.shards import SPLITS, check_folder
from gt_jax.data.sources import Plan
from gt_jax.data.tokenizers import read_tokenizer
from gt_jax.errors import InputError


def main(argv: list[str]) -> None:
    from gt_jax import cli

    flags = cli.new_flags()
    text, number, choice, yes = (
        functools.partial(define, flag_values=flags)
        for define in (
            absl_flags.DEFINE_string,
            absl_flags.DEFINE_integer,
            absl_flags.DEFINE_enum,
            absl_flags.DEFINE_bool,
        )
    )
    text(
        "tokenizer",
        None,
        "A tokenizer.json, SentencePiece .model, RWKV vocabulary, or a prepared folder.",
    )
    choice(
        "train_tokenizer", "bpe", LEARNED, "Tokenizer to train on SRC where --tokenizer names none."
    )
    number("vocab_size", 16384, "Ids of the tokenizer that is trained, if bpe or sentencepiece.", 1)
    text("field", "text", "The field or column that holds the text of JSON lines and tables.")
    number(
        "processes",
        len(os.sched_getaffinity(0)),
        "Processes that encode side by side; default: one for each core.",
        1,
    )
    yes("check", False, "Compare the files of DST with their checksums, and do nothing else.")
    words = [word for word in argv[1:] if not word.startswith("--")]
    options = [word for word in argv[1:] if word.startswith("--")]
    if not cli.parse(flags, [argv[0], *options], usage=__doc__):
        return
    match words:
        case [target] if flags.check:
            print(f"{target}: {_counted(check_folder(target), 'shard')}, all as they were written")
        case [source, target] if not flags.check:
            _prepare(source, target, flags)
        case _:
            raise InputError("say SRC DST, or --check DST; flags are --name=value, see --help")


def _prepare(source: str, target: str, flags) -> None:
    began = time.perf_counter()
    kind, size = flags.train_tokenizer, flags.vocab_size

    def make(work: Plan) -> Tokenizer:
        print(f"trains the tokenizer {kind} on {source}", flush=True)
        return train_tokenizer(kind, source, work, vocab_size=size, field=flags.field)

    given = flags.tokenizer and read_tokenizer(flags.tokenizer, "--tokenizer")
    sized = f"{kind} of {size} ids" if kind in ("bpe", "sentencepiece") else kind
    with _bar() as progress, _own_flag():
        index = prepare(
            source,
            target,
            tokenizer=given or sized,
            make_tokenizer=None if given else make,
            field=flags.field,
            processes=flags.processes,
            progress=progress,
        )
    print(_report(index, target, time.perf_counter() - began))


@contextlib.contextmanager
def _own_flag() -> Iterator[None]:
    """Errors name --field, where those of training name data.field."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("data.field=", "--field=", 1)) from error


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A function that shows progress: a bar on a terminal, a line every half minute elsewhere."""
    shown = time.perf_counter()
    columns = (TextColumn("reads"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            nonlocal shown
            bar.update(task, completed=done, total=total)
            if bar.disable and time.perf_counter() - shown > _LINE_EVERY:
                shown = time.perf_counter()
                print(f"read {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", flush=True)

        yield show


def _report(index: dict, target: str, seconds: float) -> str:
    """What was read, skipped and written, in a few lines."""
    shards, begun = index["shards"], index["begun"]
    add = lambda name: sum(shard[name] for shard in shards)
    size = sum(size for _, size in begun["files"])
    files = f"{_counted(len(begun['files']), 'file')} of {size:,} bytes: " if begun["files"] else ""
    documents = _counted(add("documents"), "document")
    lines = [f"read     {files}{documents} of {add('characters'):,} characters"]
    if index["note"]:
        lines.append(f"         {index['note']}")
    reasons = Counter(index["skipped_files"].values())
    for reason, count in reasons.items():
        first = next(path for path, why in index["skipped_files"].items() if why == reason)
        lines.append(f"skipped  {_counted(count, 'file')}: {first} {reason}")
    for reason, count in index["skipped_documents"].items():
        lines.append(
            f"skipped  {_counted(count, f'{reason} document')}: "
            + index["first_skipped"][reason].replace("data.field=", "--field=", 1)
        )
    for split in SPLITS:
        own = [shard for shard in shards if shard["split"] == split]
        if own:
            tokens = sum(shard["tokens"] for shard in own)
            lines.append(
                f"wrote    {tokens:,} tokens for {split}, in {_counted(len(own), 'shard')}"
            )
    lines.append(
        f"         {index['dtype']} ids of {index['tokenizer']}, vocabulary of "
        f"{index['vocab_size']:,}; {seconds:.0f} s, {add('tokens') / seconds:,.0f} tokens/s"
    )
    return "\n".join([*lines, f"train    --config.data.source={target}"])


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


_LINE_EVERY = 30  # seconds


if __name__ == "__main__":
    from gt_jax import cli

    cli.run(main)
