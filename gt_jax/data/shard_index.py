"""What index.json of a prepared folder and the records of its shards must look like."""

from pathlib import Path
from types import NoneType
from typing import Any

from gt_jax.errors import one_line

SPLITS = ("train", "validation")
# Every field that `gt_jax.prepare` writes, with its type.
_INDEX = {"vocab_size": int, "tokenizer": str, "note": (str, NoneType), "shards": list}
_INDEX |= dict.fromkeys(("skipped_documents", "first_skipped", "skipped_files", "begun"), dict)
_RECORD = {"file": str, "split": str, "open": bool, "sha256": str}
_RECORD |= dict.fromkeys(("tokens", "ends", "largest", "documents", "characters"), int)


def check_index(index: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError at what `gt_jax.prepare` does not write."""
    _check_types(index, _INDEX, "")
    seen = set()
    for record in index["shards"]:
        check_record(record)
        if record["file"] in seen:
            raise ValueError(f"it names {record['file']} twice")
        seen.add(record["file"])
    if index["dtype"] != dtype_for(index["vocab_size"]):
        raise ValueError(f"dtype={index['dtype']} is not for vocab_size={index['vocab_size']}")
    counts, first, files = (
        index[name] for name in ("skipped_documents", "first_skipped", "skipped_files")
    )
    _check_types(counts, dict.fromkeys(first | counts, int), "skipped_documents.")
    _check_types(first, dict.fromkeys(first | counts, str), "first_skipped.")
    _check_types(files, dict.fromkeys(files, str), "skipped_files.")
    for path, size in index["begun"]["files"]:
        _check_types({"path": path, "size": size}, {"path": str, "size": int}, "begun.files.")


def check_record(record: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError at what is no record of a shard."""
    name = record["file"]
    if Path(name).name != name:
        raise ValueError(f"{one_line(name, 80)} is no file of this folder")
    _check_types(record, _RECORD, f"{name}: ")
    if record["split"] not in SPLITS:
        raise ValueError(f"split={one_line(record['split'], 80)} of {name}")


def dtype_for(vocab_size: int) -> str:
    """The dtype of ids below vocab_size on disk."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _check_types(found, types, prefix):
    for name, kind in types.items():
        if isinstance(found[name], bool) != (kind is bool) or not isinstance(found[name], kind):
            raise TypeError(f"{prefix}{name}={one_line(found[name], 80)}")
