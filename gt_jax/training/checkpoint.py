"""Checkpoints of a run: written in the background by Orbax, read whole or refused with a reason.

WORKDIR/checkpoints/STEP/params      the parameters, float32
                         training    step, random key, optimizer, carried state, skip counts
                         about       JSON: model, tokenizer, config, place in the text, progress
                         files.json  every file's size, to tell when one is damaged
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gt_jax import stored
from gt_jax.errors import InputError, one_line
from gt_jax.models import ModelConfig, make_model
from gt_jax.training.step import TrainState

FOLDER = "checkpoints"


class Writer:
    """Saves a run's checkpoints, keeping the latest few and the best."""

    def __init__(self, workdir, *, keep: int):
        self.folder = Path(workdir).absolute() / FOLDER
        self._keep = keep
        self._manager = ocp.CheckpointManager(self.folder)
        self._clean()

    def latest_step(self) -> int | None:
        """Steps of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, about: dict, *, best_step: int | None) -> None:
        """Write checkpoint `state.step`; returns once the state is copied, then writes behind.

        Args:
            state: the run, possibly donated to the next step right after.
            about: what belongs with it and JSON can hold; "model" and "tokenizer" serve `load`.
            best_step: the older checkpoint to keep whatever its age.

        Raises:
            OSError: this or the previous checkpoint could not be written. Earlier ones are intact.
        """
        self.finish(best_step=best_step)
        parts = _parts(state)
        items = {name: ocp.args.StandardSave(parts[name]) for name in parts}
        items["about"] = ocp.args.JsonSave(about)
        self._attempt(lambda: self._manager.save(int(state.step), args=ocp.args.Composite(**items)))

    def finish(self, *, best_step: int | None) -> None:
        """Wait for the write under way, then delete what is neither among the latest nor the best.

        Raises:
            OSError: the checkpoint under way could not be written.
        """
        self._attempt(self._manager.wait_until_finished)
        steps = sorted(self._manager.all_steps())
        for step in steps[: -self._keep]:
            if step != best_step:
                self._manager.delete(step)
        if steps and jax.process_index() == 0:
            self._attempt(lambda: _write_sizes(self.folder / str(steps[-1])))

    def close(self) -> None:
        self._manager.close()

    def _attempt(self, write) -> None:
        try:
            write()
        except Exception as error:  # Orbax raises many kinds for one thing.
            self._clean()
            reason = str(error).strip().rsplit(": ", 1)[-1]
            raise OSError(
                f"a checkpoint could not be written to {self.folder} ({reason}); "
                "earlier ones are intact: make room, then run the same command again"
            ) from error

    def _clean(self) -> None:
        """Remove what an interrupted write left behind."""
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)


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
        sizes = dict(json.loads((folder / "files.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        sizes = {}  # The run was killed just after the write: the read below finds out.
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise _damaged(folder, f"{name} is {'cut off' if file.is_file() else 'missing'}")
    try:
        return json.loads((folder / "about" / "metadata").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, one_line(error)) from error


def restore(folder: Path, like: TrainState) -> TrainState:
    """The TrainState in a checkpoint folder, placed like `like` (arrays or shapes with shardings).

    Raises:
        InputError: the checkpoint is damaged, or of a model or optimizer of another shape.
    """
    parts = {name: _read(folder, name, part) for name, part in _parts(like).items()}
    return TrainState(params=parts["params"], **parts["training"])


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
    config, tokenizer = stored.describe(folder, about, _stored_shapes(folder, "params"))
    model = make_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return model, _read(folder, "params", like), tokenizer


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
    _write_sizes(folder)


def _parts(state: TrainState) -> dict:
    training = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {"params": training.pop("params"), "training": training}


def _read(folder: Path, name: str, like):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    if _stored_shapes(folder, name) != _shapes(like):
        raise InputError(f"{folder} is a checkpoint of another model: its {name} have other shapes")
    reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    try:
        return reader.restore(folder / name, args=ocp.args.StandardRestore(like))
    except Exception as error:  # Orbax raises ValueError, Exception and more for what it finds.
        raise _damaged(folder, one_line(error, 200)) from error


def _stored_shapes(folder: Path, name: str) -> dict:
    # Of the handler: a Checkpointer warns that a part of a checkpoint has no metadata of a whole.
    try:
        return _shapes(ocp.StandardCheckpointHandler().metadata(folder / name).tree)
    except Exception as error:  # as above
        raise _damaged(folder, one_line(error, 200)) from error


def _shapes(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keystr = jax.tree_util.keystr
    return {keystr(p, simple=True, separator="/"): tuple(leaf.shape) for p, leaf in leaves}


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder} is damaged ({reason}); delete it to go on from an earlier checkpoint"
    )


def _write_sizes(folder: Path) -> None:
    if (folder / "files.json").exists():
        return
    files = [p for p in folder.rglob("*") if p.is_file()]
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(files)}
    (folder / "files.json").write_text(json.dumps(sizes, indent=1))
