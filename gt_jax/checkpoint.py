"""A trained model on disk: found, read whole or refused with a reason, loaded, saved.

FOLDER/params      the parameters, float32
       about       JSON: model, tokenizer, config; of a run also step, place in the text, progress
       training    only in a run's checkpoints, see gt_jax.training.writer; so are adapters
       files.json  size and CRC-32 of all these files, so that a changed one is noticed

A run's checkpoints are WORKDIR/checkpoints/STEP. A folder there is the checkpoint of a step if its
name is that number as Python writes it, and its `about` says the same step. WORKDIR@best,
WORKDIR@last and WORKDIR@STEP name one of them, WORKDIR@STEP+STEP the mean of several, and WORKDIR
alone the best.
"""

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath  # comes with orbax-checkpoint

from gt_jax import stored
from gt_jax.data.base import Tokenizer
from gt_jax.data.corpora import replace_file
from gt_jax.data.files import small
from gt_jax.errors import InputError, did_you_mean, one_line
from gt_jax.finite import check_finite
from gt_jax.models import LanguageModel, ModelConfig, Params, make_model

FOLDER = "checkpoints"
FORMAT = 2  # In `about`: files.json belongs to it and has checksums. Older ones do not say.
_CHUNK = 1 << 22  # bytes read at once for a checksum


class Damaged(InputError):
    """A checkpoint is not as it was written."""


def steps(workdir: str | Path) -> list[int]:
    """The steps of a run's checkpoints by the names of their folders, newest first."""
    folders = [p for p in (Path(workdir) / FOLDER).glob("[0-9]*") if p.is_dir()]
    named = [p.name for p in folders if p.name.isascii() and p.name.isdigit()]
    return sorted((int(name) for name in named if name == str(int(name))), reverse=True)


class Choice(NamedTuple):
    """The checkpoints that a name stands for, and a line that says which they are."""

    folders: tuple[Path, ...]  # newest first; the model is the mean of them
    said: str


def choose(path: str | Path) -> Choice:
    """What a name stands for: a run, RUN@best, RUN@last, RUN@STEP, RUN@STEP+STEP or one folder.

    A run alone is its best checkpoint; its last one where no evaluation was finite, or the best is
    no longer there.

    Raises:
        InputError: there is no such checkpoint; the message says which ones there are.
    """
    run, name = split_name(path)
    run = run.absolute()
    if (run / "about").is_dir():
        if name is not None:
            raise InputError(f"{path}: {run} is a model of its own, not a run; leave out @{name}")
        return Choice((run,), str(run))
    kept = steps(run)
    if not kept:
        hint = f"give a run's workdir or one of its {FOLDER}/STEP folders"
        if run.is_file() or any(run.glob("*.safetensors")) or any(run.glob("pytorch_model*.bin")):
            hint = f"make one of its weights: python -m gt_jax.convert import {run} DST"
        raise InputError(f"{path} holds no checkpoint; {hint}")
    last = run / FOLDER / str(kept[0])
    if name and set(name) <= set("0123456789+"):
        named = set(name.split("+"))
        if not named <= {str(step) for step in kept}:
            raise _no_such(run, name, kept)
        wanted = sorted(map(int, named), reverse=True)
        folders = tuple(run / FOLDER / str(step) for step in wanted)
        if len(wanted) == 1:
            return Choice(folders, f"{run}, step {wanted[0]}")
        several = " and ".join(map(str, reversed(wanted)))
        return Choice(folders, f"{run}, the mean of steps {several}")
    if name == "last":
        return Choice((last,), f"{run}, step {kept[0]}, the last")
    if name not in (None, "best"):
        raise _no_such(run, name, kept)
    best, loss = _best(last)
    if best in kept:
        said = f"{run}, step {best}, the best (validation loss {loss:.4f})"
        if best != kept[0]:
            said += f"; the last is step {kept[0]}"
        return Choice((run / FOLDER / str(best),), said)
    reason = "no finite evaluation yet" if best is None else f"the best, step {best}, is gone"
    if name:
        raise InputError(f"{path}: {reason}; {_existing(kept)}")
    return Choice((last,), f"{run}, step {kept[0]}, the last: {reason}")


def find(path: str | Path) -> Path:
    """The folder of one checkpoint, by any name that `choose` takes: the newest of several.

    Raises:
        InputError: there is no such checkpoint.
    """
    return choose(path).folders[0]


def split_name(path: str | Path) -> tuple[Path, str | None]:
    """("runs/x@best") -> (Path("runs/x"), "best"); a folder with an @ in its name stays.

    The name is None where there is none.
    """
    run, at, name = str(path).rpartition("@")
    return (Path(path), None) if not at or os.path.exists(path) else (Path(run), name)


def _best(last: Path) -> tuple[Any, float | None]:
    """Step and validation loss of a run's best checkpoint, as its last one has them."""
    progress = read_about(last).get("progress")
    progress = progress if isinstance(progress, dict) else {}
    loss = progress.get("best_loss")
    known = isinstance(loss, float) and math.isfinite(loss)  # NaN was the best of an old run
    return (progress.get("best_step"), loss) if known else (None, None)


def _existing(kept: list[int]) -> str:
    return f"there are @best, @last and @{', @'.join(map(str, reversed(kept)))}"


def _no_such(run: Path, name: str, kept: list[int]) -> InputError:
    hint = did_you_mean(name, ["best", "last"])
    return InputError(f"{run} has no checkpoint @{one_line(name, 40)}{hint}; {_existing(kept)}")


def verify(folder: Path, parts: tuple[str, ...] | None = None) -> None:
    """Read the files of a checkpoint folder and compare them with files.json.

    Args:
        folder: from `find`.
        parts: the subfolders to read, e.g. ("about", "params"); None for all there are.

    Raises:
        Damaged: a file is missing, cut off or has other bytes than were written.
    """
    try:
        files = json.loads(small(folder / "files.json").read_text())
        # Before format 2, a size alone.
        sums = {n: v if isinstance(v, list) else [v, None] for n, v in files.items()}
    except FileNotFoundError:
        sums = {}  # `read_about` knows whether there should be one.
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(
            folder, f"files.json: {one_line(getattr(error, 'strerror', None) or error)}"
        ) from error
    sums = {n: v for n, v in sums.items() if parts is None or n.split("/")[0] in parts}
    for path in folder.rglob("*"):  # Reading a pipe or device might never end.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise _damaged(folder, f"{path.relative_to(folder)} is no regular file")
    with ThreadPoolExecutor(4) as pool:  # zlib lets go of the GIL
        checks = [pool.submit(_check, folder / name, *entry) for name, entry in sums.items()]
        for name, check in zip(sums, checks):
            try:
                fault = check.result()
            except (OSError, TypeError, ValueError) as error:
                fault = f"cannot be read: {error}"
            if fault:
                raise _damaged(folder, f"{name} {fault}")


def read_about(folder: Path) -> dict:
    """The JSON part of a checkpoint folder.

    Raises:
        Damaged: it is not as written, or the folder bears the number of another step.
    """
    verify(folder, ("about",))
    try:
        about = json.loads(small(folder / "about" / "metadata").read_text())
        if about.get("format", 1) >= FORMAT and not (folder / "files.json").is_file():
            raise _damaged(folder, "files.json is missing")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise _damaged(
            folder, f"about/metadata: {one_line(getattr(error, 'strerror', None) or error)}"
        ) from error
    step = about.get("step")
    if folder.parent.name == FOLDER and step is not None and folder.name != str(step):
        raise Damaged(
            f"{folder} is a copy of the checkpoint of step {step} under another number: "
            "move it out of this folder"
        )
    return about


def load(
    path: str | Path, *, say: Callable[[str], None] | None = None
) -> tuple[LanguageModel, Params, Tokenizer]:
    """A trained model, ready to apply.

    Args:
        path: a run's workdir (its best checkpoint), RUN@last, RUN@STEP, RUN@STEP+STEP (the mean of
            their parameters), one checkpoint folder or a converted model.
        say: takes a line that tells which checkpoint of a run that is.

    Returns:
        (model, params, tokenizer): a gt_jax.models module, its float32 parameters, and an object
        with encode and decode.

    Raises:
        InputError: there is no checkpoint at `path`, or it is damaged, or a parameter is NaN or
            infinite.
    """
    folders, said = choose(path)
    folder = folders[0]
    about = read_about(folder)
    verify(folder, ("params",))
    config, tokenizer = stored.describe(folder, about, stored_shapes(folder, "params"))
    model = make_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    params = read_tree(folder, "params", like)
    for other in folders[1:]:
        read_about(other)
        verify(other, ("params",))
        params = jax.tree.map(jnp.add, params, read_tree(other, "params", like))
    if len(folders) > 1:
        params = jax.tree.map(lambda x: x / len(folders), params)
    check_finite(params, str(folder), "use an earlier checkpoint, or make this model again")
    if say is not None and folder != Path(path).absolute():
        say(f"checkpoint: {said}")
    return model, params, tokenizer


def save_model(folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Write a model that was not trained by a run, for `load`; `folder` must not exist.

    Raises:
        InputError: a parameter is NaN or infinite. Nothing is written.
    """
    check_finite(params, str(folder), "such a model is not written")
    about = {
        "format": FORMAT,
        "model": dataclasses.asdict(config),
        "tokenizer": tokenizer.to_dict(),
        "config": {"model": {"dtype": "auto"}},
    }
    items = ocp.args.Composite(params=ocp.args.StandardSave(params), about=ocp.args.JsonSave(about))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder.absolute(), items)
    seal(folder)


def read_tree(folder: Path, name: str, like: Any) -> Any:
    """The arrays of part `name` of a checkpoint folder, placed like `like`.

    Args:
        folder: from `find`.
        name: "params", or another part that was written with arrays.
        like: a pytree of arrays, or of shapes with shardings.

    Raises:
        InputError: the part is damaged, or its arrays have other names or shapes.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    if stored_shapes(folder, name) != _shapes(like):
        raise InputError(f"{folder} is a checkpoint of another model: its {name} have other shapes")
    try:
        part = epath.Path(folder / name)
        return ocp.StandardCheckpointHandler().restore(part, args=ocp.args.StandardRestore(like))
    except Exception as error:  # Orbax raises ValueError, Exception and more for what it finds.
        raise _damaged(folder, one_line(error, 200)) from error


def stored_shapes(folder: Path, name: str) -> dict:
    """The shape of every array in part `name` of a checkpoint folder, by its path."""
    # Of the handler: a Checkpointer warns that a part of a checkpoint has no metadata of a whole.
    try:
        return _shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(folder / name)).tree)
    except Exception as error:  # as above
        raise _damaged(folder, one_line(error, 200)) from error


def _shapes(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keystr = jax.tree_util.keystr
    return {keystr(p, simple=True, separator="/"): tuple(leaf.shape) for p, leaf in leaves}


def seal(folder: Path) -> None:
    """Write files.json of a folder whose subfolders are final; Orbax changes its own file last."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent != folder]
    files = {str(p.relative_to(folder)): p for p in found}
    with ThreadPoolExecutor(4) as pool:
        sums = dict(zip(files, pool.map(_checksum, files.values())))
    replace_file(folder / "files.json", json.dumps(sums, indent=1).encode())


def _checksum(file: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file."""
    crc, size = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [size, crc]


def _check(file: Path, size: int, crc: int | None) -> str | None:
    """The fault of a file; None if it has none."""
    if not file.is_file():
        return "is missing"
    if (now := file.stat().st_size) != size:
        return "is cut off" if now < size else "is longer than written"
    if crc is not None and _checksum(file)[1] != crc:
        return "has other bytes than were written"
    return None


def _damaged(folder: Path, reason: str) -> Damaged:
    return Damaged(
        f"{folder} is damaged ({reason}); use an earlier one: training again sets this one aside "
        "and continues from the one before"
    )
