"""A trained model on disk: found, read whole or refused with a reason, loaded, saved.

FOLDER/params      the parameters, float32
       about       JSON: model, tokenizer, config; of a run also its place in the text and progress
       training    of a run alone, see gt_jax.training.writer
       files.json  every file's size, to tell when one is damaged

A run's checkpoints are WORKDIR/checkpoints/STEP.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gt_jax.config import computation_dtype
from gt_jax.data import tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model

FOLDER = "checkpoints"


def find(path) -> Path:
    """The folder of one checkpoint: `path` itself, or the latest of the run whose workdir it is.

    Raises:
        InputError: there is no checkpoint.
    """
    path = Path(path).absolute()
    if (path / "about").is_dir():
        return path
    steps = [int(p.name) for p in (path / FOLDER).glob("[0-9]*") if p.name.isdigit()]
    if not steps:
        raise InputError(
            f"{path} holds no checkpoint; give a run's workdir or one of its {FOLDER}/STEP folders"
        )
    return path / FOLDER / str(max(steps))


def read_about(folder: Path) -> dict:
    """The JSON part of a checkpoint folder, once all its files are seen to be whole.

    Raises:
        InputError: a file is missing or shorter than written.
    """
    try:
        sizes = json.loads((folder / "files.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        sizes = {}  # The run was killed just after the write: the read below finds out.
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise _damaged(folder, f"{name} is {'cut off' if file.is_file() else 'missing'}")
    try:
        return json.loads((folder / "about" / "metadata").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise _damaged(folder, str(error)) from error


def load(path):
    """A trained model, ready to apply.

    Args:
        path: a run's workdir (its latest checkpoint), one checkpoint folder or a converted model.

    Returns:
        (model, params, tokenizer): a gt_jax.models module, its float32 parameters, and an object
        with encode and decode.

    Raises:
        InputError: there is no checkpoint at `path`, or it is damaged.
    """
    folder = find(path)
    about = read_about(folder)
    # Of this machine: the dtype if it was "auto", and always the implementation of recurrences.
    dtype = computation_dtype(about["config"]["model"]["dtype"])
    model = make_model(ModelConfig(**about["model"] | {"dtype": dtype, "impl": "auto"}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return model, read_tree(folder, "params", like), tokenizer_from_dict(about["tokenizer"])


def save_model(folder: Path, config: ModelConfig, params, tokenizer) -> None:
    """Write a model that no run trained here, for `load`; `folder` must not exist."""
    about = {
        "model": dataclasses.asdict(config),
        "tokenizer": tokenizer.to_dict(),
        "config": {"model": {"dtype": "auto"}},
    }
    items = ocp.args.Composite(params=ocp.args.StandardSave(params), about=ocp.args.JsonSave(about))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder.absolute(), items)
    write_sizes(folder)


def read_tree(folder: Path, name: str, like):
    """The arrays of part `name` of a checkpoint folder, placed like `like`.

    Args:
        folder: from `find`.
        name: "params", or another part that was written with arrays.
        like: a pytree of arrays, or of shapes with shardings.

    Raises:
        InputError: the part is damaged, or its arrays have other names or shapes.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    try:
        stored = _shapes(reader.metadata(folder / name).item_metadata.tree)
        if stored == _shapes(like):
            return reader.restore(folder / name, args=ocp.args.StandardRestore(like))
    except Exception as error:  # Orbax raises ValueError, Exception and more for what it finds.
        raise _damaged(folder, str(error)[:200]) from error
    raise InputError(f"{folder} is a checkpoint of another model: its {name} have other shapes")


def _shapes(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True): tuple(leaf.shape) for p, leaf in leaves}


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder} is damaged ({reason}); delete it to go on from an earlier checkpoint"
    )


def write_sizes(folder: Path) -> None:
    """Write files.json of a finished checkpoint folder, unless it has one."""
    if (folder / "files.json").exists():
        return
    files = [p for p in folder.rglob("*") if p.is_file()]
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(files)}
    (folder / "files.json").write_text(json.dumps(sizes, indent=1))
