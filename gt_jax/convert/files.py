"""Checkpoint files of other libraries: one file of weights, or a folder with config.json.

Weights are safetensors or torch.save files, whole or in shards that an index lists.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gt_jax.convert import pth
from gt_jax.convert.tensor import Tensor
from gt_jax.errors import InputError, one_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# First bytes of files that users mistake for weights -> what the file is, and the fix.
OTHERS = {
    b"GGUF": "it is a GGUF file, whose weights are rounded; give the model it was made of",
    b"version https://git-lfs": "it only points to the weights; get them with `git lfs pull`",
    b"\x1f\x8b": "it is packed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "it is packed with zstd; unpack it first",
    b"\x89HDF": "it is an HDF5 file; save the weights as safetensors",
    b"\x93NUMPY": "it is one NumPy array",
    b"<": "it is a web page, not what should have been downloaded",
}
SHARD_BYTES = 5_000_000_000
LARGEST_JSON = 1 << 24  # bytes; the index of the largest models has some 100 kB
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Source(NamedTuple):
    """What lies at a path: its tensors by name, and config.json ({} for a file of weights)."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def read(path: str | Path) -> Source:
    """Open a file of weights, or a folder of config.json and weights.

    Raises:
        InputError: nothing readable lies there; the message names the file and its fault.
    """
    path = Path(path)
    if path.is_file():
        return Source(path, _read_weights(path), {})
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a file of weights or a folder with them")
    config = read_json(path / "config.json")
    for name in WEIGHTS:
        if (path / f"{name}.index.json").is_file():
            return Source(path, _read_shards(path / f"{name}.index.json"), config)
        if (path / name).is_file():
            return Source(path, _read_weights(path / name), config)
    raise InputError(f"{path} holds no weights: neither {' nor '.join(WEIGHTS)}, nor their index")


def read_json(path: Path) -> dict:
    """The object in a JSON file; InputError if there is none or a key occurs twice."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} cannot be read (it is no file)")
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise InputError(f"{path} has more than {LARGEST_JSON:,} bytes; it is no such file")
        return _parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON object ({one_line(error)})") from error


def _parse(text: bytes) -> dict:
    def unique(pairs):
        seen = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"{key!r} stands in it twice")
            seen[key] = value
        # transformers writes infinity as {"__float__": "Infinity"}.
        return float(str(seen["__float__"])) if list(seen) == ["__float__"] else seen

    content = json.loads(text, object_pairs_hook=unique)
    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}")
    return content


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; its first bytes tell its kind."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if start[:4] == b"PK\3\4":
        return pth.read(path)
    # A pickle without a zip around it; the length of a safetensors header may begin like one.
    if start[:1] == b"\x80" and start[8:9] != b"{":
        raise InputError(f"{path} is in torch's format before 1.6; torch.load and torch.save it")
    try:
        return _read_safetensors(path)
    except InputError as error:
        other = next((said for mark, said in OTHERS.items() if start.startswith(mark)), None)
        if other:
            raise InputError(f"{path} holds no weights: {other}") from error
        raise


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = import_safetensors()
    try:
        file = safetensors.safe_open(path, framework="np")
        with path.open("rb") as raw:  # Of two tensors of one name the package takes the last.
            _parse(raw.read(int.from_bytes(raw.read(8), "little")))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        if unprintable := [name for name in slices if not name.isprintable()]:
            raise ValueError(f"it holds the name {unprintable[0][:80]!r}")
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged or no checkpoint ({one_line(error)})") from error

    def read_tensor(name):
        try:
            return file.get_tensor(name)
        except Exception as error:  # the package raises many kinds for one thing
            raise InputError(f"{path} is damaged ({one_line(error)})") from error

    return {
        name: Tensor(
            tuple(part.get_shape()),
            SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()),
            functools.partial(read_tensor, name),
        )
        for name, part in slices.items()
    }


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index lists, each where it says."""
    file_of = read_json(index).get("weight_map")
    whole = isinstance(file_of, dict) and all(isinstance(v, str) for v in file_of.values())
    if not whole or not file_of:
        raise InputError(f"{index} lists no shards: it needs a weight_map of tensor to file")
    names = list(dict.fromkeys(file_of.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise InputError(
                f"{index} lists {name[:80]!r}; a shard must be a file beside the index"
            )
        if not name.isprintable() or not (index.parent / name).is_file():
            raise InputError(
                f"{index.parent / one_line(name)} is missing, and {index.name} lists it"
            )
    tensors = {}
    for name in names:
        shard = index.parent / name
        found = _read_weights(shard)
        for tensor in found:
            if file_of.get(tensor) != name:
                place = f"in {file_of[tensor]}" if tensor in file_of else "nowhere"
                raise InputError(f"{shard} holds {tensor}, which {index.name} says is {place}")
        tensors |= found
    if absent := [tensor for tensor in file_of if tensor not in tensors]:
        raise InputError(f"{index.parent / file_of[absent[0]]} lacks {absent[0]}, listed in it")
    return tensors


def check_free(path: str | Path) -> None:
    """Raise InputError if there is something at `path`, or nothing can be made there."""
    if Path(path).exists():
        raise InputError(f"{path} exists; name another place, or remove it first")
    for folder in Path(path).parents:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{path} cannot be made: {folder} is no folder; name another place")


@contextlib.contextmanager
def new(path: str | Path) -> Iterator[Path]:
    """A path to write to: it becomes `path` if all goes well and is removed if not."""
    path = Path(path)
    unfinished = path.parent / f".{path.stem}.unfinished{path.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(unfinished)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)


def _remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file of weights: safetensors if its name ends so, else as torch.save does."""
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(arrays, path, metadata={"format": "pt"})
    else:
        pth.write(path, arrays)


def write_folder(
    folder: Path, weights: str, arrays: Mapping[str, np.ndarray], config: dict
) -> None:
    """Write config.json and weights, with an index of shards past SHARD_BYTES.

    Args:
        folder: to make.
        weights: file name, one of WEIGHTS.
        arrays: by name.
        config: content of config.json.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards, size = [{}], 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    if len(shards) == 1:
        return write(folder / weights, arrays)
    stem, suffix = weights.split(".")
    files = [f"{stem}-{i + 1:05}-of-{len(shards):05}.{suffix}" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        write(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
    }
    (folder / f"{weights}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def import_safetensors() -> ModuleType:
    """The safetensors package, or an InputError that says how to get it."""
    try:
        import safetensors
    except ImportError as error:
        raise InputError("safetensors files need a package: pip install safetensors") from error
    return safetensors
