"""Which files of a folder train, validate or test, where their names say so."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gt_jax.errors import InputError

_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_NAMES |= dict.fromkeys(("valid", "validation", "val", "dev"), "validation")
# A name of a split, a text's own before it ("ptb.train"), numbers of shards ("train-00001-of-8").
_STEM = re.compile(rf"(.*[._-])?({'|'.join(_NAMES)})(?:[._-]?\d+)*(?:-of-\d+)?")
# A name as a word among others: "train_en", "test-split", "split=train", "trainset".
_WORD = re.compile(rf"(?<![^\W_])({'|'.join(_NAMES)})(?:set|split)?(?![^\W\d_])")


class Splits(NamedTuple):
    """The files to train, validate and test on, of the last two maybe none, and a line of note."""

    train: list[Path]
    validation: list[Path]
    test: list[Path]
    note: str


def named_splits(
    where: str, files: dict[Path, Path], stem_of: Callable[[Path], str]
) -> Splits | None:
    """The splits that names of files or sub folders tell apart; None where none does.

    train.txt, train-00001-of-00008.jsonl or train/a.txt train; valid, validation, val or dev
    validate; test is never read. A text's own name may stand before, as in ptb.train.txt, if the
    folder has a file to train on so named. Where no name is of these, one may also stand among
    other words, as in train_en.txt and split=test/a.txt, if files to train on and others are so
    named.

    Args:
        where: what named the folder, to begin a message with.
        files: path -> path in the folder.
        stem_of: the name of a file without its kind, in lower case.

    Raises:
        InputError: the names leave open what a file is for.
    """
    named = lambda read: {file: read(inside, stem_of) for file, inside in files.items()}
    kinds = lambda found: {_NAMES[name] for names in found.values() for name in names}
    found = named(_names_of)
    if not kinds(found):
        found = named(functools.partial(_names_of, loose=True))
        if "train" not in kinds(found):
            found = named(_words_of)
            if "train" not in kinds(found) or len(kinds(found)) == 1:
                return None
    advice = "name the files or sub folders train, valid and test, or name one file"
    splits = {"train": {}, "validation": {}, "test": {}}  # split -> file -> name
    for file, names in found.items():
        if not names:
            raise InputError(
                f"{where} holds {_named(files, found)}, and {files[file]}, which no split is named "
                f"for; {advice}"
            )
        if len({_NAMES[name] for name in names}) > 1:
            raise InputError(
                f"{where} holds {files[file]}, which names {' and '.join(names)}; {advice}"
            )
        splits[_NAMES[names[0]]][file] = names[0]
    if not splits["train"]:
        raise InputError(f"{where} holds {_named(files, found)} and nothing to train on; {advice}")
    for split, members in splits.items():
        if len(set(members.values())) > 1:
            both = " and ".join(sorted(set(members.values())))
            raise InputError(f"{where} holds {both}, both for {split}; keep one of them")
        stems = {}
        for file in members:
            twin = stems.setdefault(files[file].with_name(stem_of(file)), file)
            if twin != file:
                raise InputError(
                    f"{where} holds {files[twin]} and {files[file]}, which may be one text twice; "
                    "keep one of them"
                )
    held_out = splits["validation"]
    note = f"trains on {_said(splits['train'], files)}, validates on "
    note += _said(held_out, files) if held_out else "the end of it"
    note += f"; {_said(splits['test'], files)} is left out" if splits["test"] else ""
    return Splits(list(splits["train"]), list(held_out), list(splits["test"]), note)


def _names_of(inside, stem_of, *, loose=False):
    """Names of splits in a file's path, from the outermost, each once."""
    names = [part.lower() for part in inside.parts[:-1] if part.lower() in _NAMES]
    stem = _STEM.fullmatch(stem_of(inside))
    if stem and (loose or not stem[1]):
        names.append(stem[2])
    return list(dict.fromkeys(names))


def _words_of(inside, stem_of):
    """Names of splits that are words in a file's path, each once."""
    parts = [*map(str.lower, inside.parts[:-1]), stem_of(inside)]
    return list(dict.fromkeys(name for part in parts for name in _WORD.findall(part)))


def _named(files, found):
    return next(str(files[file]) for file, names in found.items() if names)


def _said(members, files):
    first = next(iter(members))
    return str(files[first]) if len(members) == 1 else f"{len(members)} files of {members[first]}"
