"""What a file or folder of text holds, cut into units of work that depend on the files alone."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gt_jax.data.corpora import SHAKESPEARE
from gt_jax.data.files import ARCHIVES, KINDS, kind_of, short, stem_of
from gt_jax.data.splits import named_splits
from gt_jax.data.tables import row_groups
from gt_jax.errors import InputError, did_you_mean

UNIT = 1 << 24  # bytes of a unit of work; more where a source would have over MOST_UNITS
MOST_UNITS = 4096


class Range(NamedTuple):
    """A part of a file: what begins in its bytes from start to stop, or row groups of Parquet.

    path is in the source's folder, "." for the source itself; nothing of the file follows if last.
    """

    path: str
    start: int
    stop: int
    last: bool


class Unit(NamedTuple):
    """What one worker reads into one shard, of this name."""

    name: str
    split: str
    ranges: tuple[Range, ...]


class Plan(NamedTuple):
    """How a source is read.

    Attributes:
        units: in the order of the documents.
        files: path in the source -> bytes, of every file that is read.
        skipped: path in the source -> why it is not read.
        note: what names of files said of splits, or None.
    """

    units: list[Unit]
    files: dict[str, int]
    skipped: dict[str, str]
    note: str | None


def plan(source: str, field: str) -> Plan:
    """The units of a file, a folder or a built-in text.

    Args:
        source: a path, or a name of `load_corpus`; a folder of Hugging Face's `save_to_disk` too.
        field: where text is in tables.

    Raises:
        InputError: nothing there that can be read, or names of files leave their split open.
    """
    if source in SHAKESPEARE:
        return Plan([Unit("train-00000", "train", (Range(".", 0, 1, True),))], {}, {}, None)
    root = Path(source).expanduser()
    skipped, splits = {}, None
    if root.is_file():
        if {*kind_of(root)} & {*ARCHIVES}:
            raise InputError(f"{short(source)} is an archive; unpack it and name the folder")
        found = {root: Path(".")}
    elif root.is_dir():
        files = sorted(path for path in root.rglob("*") if path.is_file())
        found = {path: path.relative_to(root) for path in files if _has_text(path)}
        if not found:
            kinds = ", ".join(KINDS)
            raise InputError(f"{short(source)} holds no file of {kinds} or .arrow; add one")
        skipped = {
            str(path.relative_to(root)): "is no text, JSONL, Parquet or Arrow file"
            for path in files
            if path not in found
        }
        splits = named_splits(short(source), found, stem_of)
    else:
        hint = did_you_mean(source, SHAKESPEARE) or f"; name one, or {' or '.join(SHAKESPEARE)}"
        raise InputError(f"{short(source)} is no file, folder or built-in text{hint}")
    train, held_out = (splits.train, splits.validation) if splits else (list(found), [])
    used = {*train, *held_out}
    skipped |= {str(found[path]): "belongs to the test split" for path in found.keys() - used}
    sizes = {path: path.stat().st_size for path in (*train, *held_out)}
    most = max(UNIT, sum(sizes.values()) // MOST_UNITS)
    units = []
    for split, paths in (("train", train), ("validation", held_out)):
        ranges = (r for path in paths for r in _ranges(path, found[path], sizes[path], most, field))
        units += _units(split, ranges, most)
    named = {str(found[path]): size for path, size in sizes.items()}
    return Plan(units, named, skipped, splits.note if splits else None)


def _has_text(path: Path) -> bool:
    kind, packing = kind_of(path)
    return kind in KINDS or (kind == ".arrow" and not packing)


def _ranges(path, inside, size, most, field) -> Iterator[tuple[Range, int]]:
    """The ranges of a file of `size` bytes, each with its bytes: about `most` where it can be cut.

    Packed files and Arrow streams can be read from their start alone.
    """
    kind, packing = kind_of(path)
    if kind == ".parquet" and not packing:
        groups = row_groups(path, field)
        first = held = 0
        for group, group_size in enumerate(groups, start=1):
            held += group_size
            if held >= most or group == len(groups):
                yield Range(str(inside), first, group, group == len(groups)), held
                first, held = group, 0
        return
    step = max(size, 1) if packing or kind == ".arrow" else most
    for start in range(0, max(size, 1), step):
        stop = min(start + step, size)
        yield Range(str(inside), start, stop, stop == size), stop - start


def _units(split: str, ranges: Iterable[tuple[Range, int]], most: int) -> list[Unit]:
    """Units of consecutive ranges, each of at least `most` bytes but the last."""
    groups, held = [], most
    for part, size in ranges:
        if held >= most:
            groups.append([])
            held = 0
        groups[-1].append(part)
        held += size
    return [Unit(f"{split}-{n:05d}", split, tuple(group)) for n, group in enumerate(groups)]
