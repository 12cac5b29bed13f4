"""What a preparation under way has done, written so that a later one can tell whether it is whole.

A unit is done when its record and its shard are those that were written; any other one is written
again. The tokenizer cannot be: shards were made with it, so another one in its place is an error.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gt_jax.data.base import Tokenizer
from gt_jax.data.corpora import replace_file
from gt_jax.data.files import small
from gt_jax.data.shard_index import check_record
from gt_jax.data.shards import TOKENIZER, read_json
from gt_jax.data.sources import Unit
from gt_jax.data.tokenizers import tokenizer_from_dict
from gt_jax.errors import InputError, one_line

BEGUN = "begun.json"


def shard_name(unit: Unit) -> str:
    return f"{unit.name}.shard"


def write_record(folder: Path, unit: Unit, record: dict[str, Any]) -> None:
    """Note that a unit is done; the note appears whole."""
    replace_file(folder / f"{unit.name}.json", json.dumps(record | {"crc": _crc(record)}).encode())


def read_records(folder: Path, target: Path, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """The records of the units that are done, in their order; shards may have moved to `target`."""
    found = (_read_record(folder, target, unit) for unit in units)
    return [record for record in found if record is not None]


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Keep the tokenizer for all units to come, and its hash beside what was begun."""
    data = json.dumps(tokenizer.to_dict()).encode()
    replace_file(folder / TOKENIZER, data)
    begun = read_json(folder / BEGUN) | {"tokenizer_sha256": hashlib.sha256(data).hexdigest()}
    replace_file(folder / BEGUN, json.dumps(begun).encode())


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that was kept; None where there is none yet.

    Raises:
        InputError: it is not as it was written.
    """
    path = folder / TOKENIZER
    if not path.exists():
        return None
    try:
        data = small(path).read_bytes()
        known = read_json(folder / BEGUN).get("tokenizer_sha256")  # not of an earlier version
        if known not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError("it has other bytes than were written")
        return tokenizer_from_dict(json.loads(data))
    except Exception as error:  # packages that read tokenizers raise many kinds
        raise InputError(
            f"{path} is damaged ({one_line(error)}); delete {folder.parent} to start anew"
        ) from error


def _read_record(folder: Path, target: Path, unit: Unit) -> dict[str, Any] | None:
    """None where the unit has to be written, perhaps again."""
    name = shard_name(unit)
    shard = folder / name if (folder / name).exists() else target / name
    try:
        record = json.loads(small(folder / f"{unit.name}.json").read_bytes())
        if record.pop("crc") != _crc(record):
            return None
        check_record(record)
        whole = record["file"] == name and record["split"] == unit.split
        return record if whole and _sha256(shard) == record["sha256"] else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _crc(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
