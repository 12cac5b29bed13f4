"""Text of any size to token shards: over several processes, and resumable after any end.

A source is cut into units of work that depend on its files alone (`sources`), each unit becomes one
shard, and a shard is done when its record is on disk. So neither the number of processes nor the
number of interruptions changes a byte of what is written.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from gt_jax.data.base import Tokenizer
from gt_jax.data.corpora import replace_file
from gt_jax.data.reading import Document, documents
from gt_jax.data.shard_index import dtype_for
from gt_jax.data.shards import (
    FORMAT,
    INDEX,
    TOKENIZER,
    UNFINISHED,
    ShardWriter,
    open_prepared,
    read_json,
)
from gt_jax.data.sources import Plan, Unit, plan
from gt_jax.data.tokenizers import tokenizer_from_dict
from gt_jax.data.unfinished import (
    BEGUN,
    read_records,
    read_tokenizer,
    shard_name,
    write_record,
    write_tokenizer,
)
from gt_jax.errors import InputError, one_line

_PATIENCE = 1000  # unreadable documents before the first that can be read: a wrong field
_OTHER = "name another folder, or delete this one to start anew"


def prepare(
    source: str,
    target: str | Path,
    *,
    tokenizer: Tokenizer | str,
    make_tokenizer: Callable[[Plan], Tokenizer] | None = None,
    field: str = "text",
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the token shards of a file or folder, or continue where an earlier call was ended.

    Args:
        source: .txt, .jsonl, both packed too, .parquet, a folder of these, a folder that Hugging
            Face's datasets saved, or a built-in text.
        target: folder to make; see `gt_jax.data.shards`.
        tokenizer: one, or the name of what `make_tokenizer` makes, to tell resumed work by.
        make_tokenizer: trains a tokenizer on the source, once.
        field: where text is in JSON objects and tables.
        processes: how many work side by side; None for one a core. Workers are spawned and import
            the main module, so a script must call this from its guarded main part alone.
        progress: called now and then with the bytes of files that have been read, and of all.

    Returns:
        What index.json of the folder holds.

    Raises:
        InputError: the source cannot be read or holds no text, or the target holds something else.
    """
    target = Path(target).expanduser()
    work = plan(source, field)
    begun = {
        "format": FORMAT,
        "source": source,
        "field": field,
        "tokenizer": tokenizer if isinstance(tokenizer, str) else _hash(tokenizer),
        "files": [[path, size] for path, size in work.files.items()],
        "units": [unit.name for unit in work.units],
    }
    with _hold(target, begun) as finished:
        if finished is not None:
            return finished
        unfinished = target / UNFINISHED
        if read_tokenizer(unfinished) is None:
            made = make_tokenizer(work) if make_tokenizer else tokenizer
            assert isinstance(made, Tokenizer)
            write_tokenizer(unfinished, made)
        written = read_records(unfinished, target, work.units)
        records = _write_units(source, work, field, unfinished, written, processes, progress)
        index = _index(begun, work, unfinished, records)
        for record in index["shards"]:
            if (unfinished / record["file"]).exists():
                (unfinished / record["file"]).replace(target / record["file"])
        if (unfinished / TOKENIZER).exists():
            shutil.copyfile(unfinished / TOKENIZER, target / TOKENIZER)
        replace_file(target / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        shutil.rmtree(unfinished)
    return index


@contextlib.contextmanager
def _hold(target: Path, begun: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Keep other processes out of the folder. Gives its index if it is finished, else None.

    Raises:
        InputError: it holds something else, or another process writes there.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; name a folder to make")
    unfinished = target / UNFINISHED
    if target.is_dir() and any(target.iterdir()) and not unfinished.is_dir():
        if not (target / INDEX).is_file():
            raise InputError(f"{target} holds other files; {_OTHER}")
        index = open_prepared(target).index
        _check_same(target, index["begun"], begun)
        yield index
        return
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(unfinished / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"{target} is being written by another process; wait for it") from error
    with lock:
        if (unfinished / BEGUN).exists():
            _check_same(target, read_json(unfinished / BEGUN), begun)
        else:
            replace_file(unfinished / BEGUN, json.dumps(begun).encode())
        for partial in unfinished.glob("*.partial"):
            partial.unlink()
        yield None


def _check_same(target, before, now):
    """Raise InputError unless what a folder was begun with is what it should hold now."""
    for name in ("format", "source", "field", "tokenizer"):
        if before.get(name) != now[name]:
            said = f"{name}={one_line(before.get(name), 80)}, not {one_line(now[name], 80)}"
            raise InputError(f"{target} was begun with {said}; {_OTHER}")
    if before.get("files") != now["files"] or before.get("units") != now["units"]:
        known = before.get("files")
        known = known if isinstance(known, list) else []
        changed = [file[0] for file in now["files"] if file not in known]
        changed += [str(file) for file in known if file not in now["files"]]
        name = changed[0] if changed else "its files"
        raise InputError(f"{target} was begun when {now['source']} held another {name}; {_OTHER}")


def _write_units(
    source, work: Plan, field, unfinished: Path, written: list[dict[str, Any]], processes, progress
) -> list[dict[str, Any]]:
    """Write the shard and the record of every unit but those `written`. Returns all records."""
    seen = list(written)
    names = {record["file"] for record in seen}
    left = [unit for unit in work.units if shard_name(unit) not in names]
    total, sizes = sum(work.files.values()), _bytes_of(work)
    before = total - sum(sizes[unit.name] for unit in left)
    progress(before, total)
    processes = min(processes or len(os.sched_getaffinity(0)), max(len(left), 1))
    if processes == 1:
        done = before

        def count(size):
            nonlocal done
            done += size
            progress(min(done, total), total)

        _begin(unfinished, count)
        for unit in left:
            seen.append(_write_unit(source, unit, field, unfinished))
            _check_readable(seen)
        return _in_order(seen, work)
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", before), context.Event()
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (unfinished, counter, stop))
    try:
        waiting = {pool.submit(_write_unit, source, unit, field, unfinished) for unit in left}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            seen += [future.result() for future in finished]
            _check_readable(seen)
            progress(min(counter.value, total), total)
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was killed, as the system does where memory is full; run the same "
            "command again to continue, with fewer --processes"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return _in_order(seen, work)


def _in_order(records, work: Plan) -> list[dict[str, Any]]:
    """Records in the order of the text."""
    by_name = {record["file"]: record for record in records}
    return [by_name[shard_name(unit)] for unit in work.units]


def _bytes_of(work: Plan) -> dict[str, int]:
    """Unit -> about how many bytes of files it reads."""
    sizes = {unit.name: 0 for unit in work.units}
    spans: dict[str, int] = {}
    for unit in work.units:
        for part in unit.ranges:
            spans[part.path] = max(spans.get(part.path, 1), part.stop)
    for unit in work.units:
        for part in unit.ranges:
            share = (part.stop - part.start) / spans[part.path]
            sizes[unit.name] += round(share * work.files.get(part.path, 0))
    return sizes


class _Stopped(Exception):
    """The main process wants no more."""


def _begin_worker(unfinished: Path, counter, stop) -> None:
    """In a new process: end when the main process does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    def count(size):
        with counter.get_lock():
            counter.value += size
        if stop.is_set():
            raise _Stopped

    _begin(unfinished, count)


def _begin(unfinished: Path, count: Callable[[int], None]) -> None:
    """What all units of a process share."""
    tokenizer = read_tokenizer(unfinished)
    _shared.update(tokenizer=tokenizer, count=count)


_shared: dict[str, Any] = {}


def _write_unit(source: str, unit: Unit, field: str, unfinished: Path) -> dict[str, Any]:
    """Write a unit's shard, then its record, which is returned; both appear whole."""
    tokenizer, count = _shared["tokenizer"], _shared["count"]
    partial = unfinished / f"{unit.name}.{os.getpid()}.partial"
    writer = ShardWriter(partial, dtype_for(tokenizer.vocab_size))
    read = {"documents": 0, "characters": 0}
    skipped: dict[str, list] = {}  # reason -> how many, and the first
    try:
        for part in unit.ranges:
            for item in documents(source, part, field, count):
                if isinstance(item, Document):
                    read["documents"] += item.begins
                    read["characters"] += _write_document(writer, item, tokenizer)
                else:
                    skipped.setdefault(item.reason, [0, item.message])[0] += 1
        record = writer.close()
    except InputError as error:
        writer.abandon()
        raise InputError(f"{one_line(error)} (in {unit.name} of {source})") from error
    except BaseException:
        writer.abandon()
        raise
    name = shard_name(unit)
    record = {"file": name, "split": unit.split, **record, **read, "skipped": skipped}
    partial.replace(unfinished / name)
    write_record(unfinished, unit, record)
    return record


def _write_document(writer: ShardWriter, document: Document, tokenizer: Tokenizer) -> int:
    """Encode a document, or the part of it that is here. Returns its characters."""
    before, characters = "" if document.begins else "\n", 0
    if document.begins and tokenizer.start_ids:
        writer.add(np.array(tokenizer.start_ids))
    for block in document.blocks:
        writer.add(tokenizer.encode_after(block, before) if before else tokenizer.encode(block))
        before = block
        characters += len(block)
    if document.ends:
        if tokenizer.eos_id is not None:
            writer.add(np.array([tokenizer.eos_id]))
        writer.end_document()
    return characters


def _check_readable(records: list[dict[str, Any]]) -> None:
    """Raise InputError early if nothing can be read, e.g. as --field is wrong."""
    if not any(record["documents"] for record in records):
        failed = [record["skipped"]["unreadable"] for record in records
                  if "unreadable" in record["skipped"]]  # fmt: skip
        if sum(number for number, _ in failed) >= _PATIENCE:
            raise InputError(f"no document can be read: {failed[0][1]}")


def _index(begun, work: Plan, unfinished: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What index.json says.

    Raises:
        InputError: there is nothing to train on.
    """
    skipped: dict[str, list] = {}
    for record in records:
        for reason, (number, first) in record.pop("skipped").items():
            skipped.setdefault(reason, [0, first])[0] += number
    shards = [record for record in records if record["tokens"]]
    if not any(record["split"] == "train" for record in shards):
        why = f": {next(iter(skipped.values()))[1]}" if skipped else ""
        raise InputError(f"{begun['source']} holds no text to train on{why}; name another")
    text = (unfinished / TOKENIZER).read_bytes()
    stored = json.loads(text)
    vocab_size = tokenizer_from_dict(stored).vocab_size
    return {
        "format": FORMAT,
        "dtype": dtype_for(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer": stored["kind"],
        "tokenizer_sha256": hashlib.sha256(text).hexdigest(),
        "note": work.note,
        "skipped_documents": {reason: number for reason, (number, _) in skipped.items()},
        "first_skipped": {reason: first for reason, (_, first) in skipped.items()},
        "skipped_files": work.skipped,
        "shards": shards,
        "begun": begun,
    }


def _hash(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_dict()).encode()).hexdigest()
