"""Checkpoints of a run under way: written in the background by Orbax, restored to continue it.

WORKDIR/checkpoints/STEP/params, about, files.json   as in gt_jax.checkpoint
                         training    step, random key, optimizer, carried state, skip counts

Where an average of the parameters is evaluated, that is params, and training has the others. Where
adapters are trained, params have them merged, as any program loads a model; training has the base
and the adapters as they are trained, and adapters those that are merged.

A folder gets its number when all of it is written, files.json included: a process that is killed
leaves whole checkpoints and a folder of another name, which the next one removes.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gt_jax import checkpoint
from gt_jax.checkpoint import FOLDER, FORMAT, Damaged, read_about, read_tree
from gt_jax.errors import InputError
from gt_jax.finite import check_finite
from gt_jax.training import hosts, lora, tuning
from gt_jax.training.display import say
from gt_jax.training.optimizer import is_averaged
from gt_jax.training.step import TrainState

_DELETED = "deleted"  # checkpoints on their way out: renamed first, so that none is half there


class Writer:
    """Saves a run's checkpoints, keeping the latest few and the best. A context manager.

    However the context ends, the checkpoint under way is finished first, or removed if it cannot
    be.
    """

    def __init__(self, workdir: str | Path, *, keep: int, keep_every: int = 0):
        """keep: how many of the latest; keep_every: whose multiples stay for good, 0 for none."""
        self.folder = Path(workdir).absolute() / FOLDER
        self._keep, self._keep_every = keep, keep_every
        self._saving = None  # the step under way
        after = ocp.options.AsyncOptions(post_finalization_callback=self._seal)
        options = ocp.CheckpointManagerOptions(
            async_options=after,
            todelete_subdir=_DELETED,
            lightweight_initialize=True,  # a damaged _CHECKPOINT_METADATA, unused, would end it
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._clean()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            self._manager.close()
        elif self._saving is not None:
            try:
                self._manager.wait_until_finished()
            except Exception:  # `error` is what ends the run.
                self._clean()

    def save(self, state: TrainState, about: dict, *, best_step: int | None) -> None:
        """Write checkpoint `state.step`; returns once the state is copied, then writes behind.

        Args:
            state: the run, possibly donated to the next step right after.
            about: what belongs with it and JSON can hold; `gt_jax.load` needs its "model",
                "tokenizer" and "config".
            best_step: the older checkpoint to keep whatever its age.

        Raises:
            OSError: this or the previous checkpoint could not be written. Earlier ones are intact.
        """
        self.finish(best_step=best_step)
        adapters, step = state.averaged.get(lora.KEY), int(state.step)
        parts = _parts(state, state.evaluated, adapters)
        if hosts.count() == 1:
            parts = _on_host(parts)
        items: dict[str, Any] = {name: ocp.args.StandardSave(parts[name]) for name in parts}
        items["about"] = ocp.args.JsonSave({"format": FORMAT, "step": step, **about})
        self._saving = step
        args = ocp.args.Composite(**items)
        self._attempt(lambda: self._manager.save(step, args=args, force=True))

    def finish(self, *, best_step: int | None) -> None:
        """Wait for the write under way, then delete all but the latest, the best and those to stay.

        Raises:
            OSError: the checkpoint under way could not be written.
        """
        for step in self.steps()[self._keep :]:
            stays = self._keep_every and step % self._keep_every == 0
            if step != best_step and not stays:
                self._manager.delete(step)
        if hosts.is_first():
            shutil.rmtree(self.folder / _DELETED, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, newest first, once that under way is written.

        Raises:
            OSError: it could not be written.
        """
        self._attempt(self._manager.wait_until_finished)
        self._saving = None
        return hosts.of_first(lambda: checkpoint.steps(self.folder.parent))

    def drop_from(self, step: int) -> None:
        """Delete the checkpoints of `step` and of later ones."""
        for later in self.steps():
            if later >= step:
                self._manager.delete(later)

    def _attempt(self, write) -> None:
        try:
            write()
        except Exception as error:  # Orbax raises many kinds for one thing.
            self._saving = None
            self._clean()
            reason = str(error).strip().rsplit(": ", 1)[-1]
            raise OSError(
                f"a checkpoint could not be written to {self.folder} ({reason}); "
                "earlier ones are intact: make room, then run the same command again"
            ) from error

    def _seal(self) -> None:
        """Orbax calls this in its thread, between the last byte and the folder's final name."""
        if hosts.is_first():
            for unfinished in self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                checkpoint.seal(unfinished)

    def _clean(self) -> None:
        """Remove what an interrupted write or deletion left behind."""
        if not hosts.is_first():
            return
        for unfinished in (*self.folder.glob("*.orbax-checkpoint-tmp*"), self.folder / _DELETED):
            for _ in range(20):  # threads of a save that has failed may still write there
                shutil.rmtree(unfinished, ignore_errors=True)
                if not unfinished.exists():
                    break
                time.sleep(0.05)


def newest(workdir: str | Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint of a run and its `about`; None where there is no checkpoint.

    Newer ones that are damaged are set aside: renamed to STEP.damaged, with a line that says so.

    Raises:
        Damaged: none is whole. All stay as they are.
    """
    faults = {}
    for step in checkpoint.steps(workdir):
        folder = Path(workdir).absolute() / FOLDER / str(step)
        try:
            checkpoint.verify(folder)
            about = read_about(folder)
            if about.get("format", 1) < FORMAT:
                _read_whole(folder)
        except Damaged as error:
            faults[folder] = error
            continue
        for damaged, error in faults.items():
            reason = str(error).split("; ")[0]
            say(f"{reason}: now {_set_aside(damaged).name}; continuing from step {step}")
        return folder, about
    if faults:
        raise next(iter(faults.values()))
    return None


def newest_of_all(workdir: str | Path) -> tuple[Path, dict] | tuple[None, None]:
    """`newest` as process 0 finds it, for all: the others read no more than `about`."""
    found = newest(workdir) if hosts.is_first() else None
    step = hosts.of_first(lambda: found and int(found[0].name))
    if step is None:
        return None, None
    folder = Path(workdir).absolute() / FOLDER / str(step)
    return folder, found[1] if found else read_about(folder)


def restore(folder: Path, like: TrainState) -> TrainState:
    """The TrainState in a checkpoint folder, placed like `like` (arrays or shapes with shardings).

    Raises:
        InputError: the checkpoint is damaged, of a model or optimizer of another shape, or holds
            NaN or infinity.
    """
    parts = _parts(like, lora.base(like.params), like.params.get(lora.KEY))
    adapted = "adapters" in parts  # and params are of the merged model, which is not continued
    averaged = {} if adapted else read_tree(folder, "params", parts["params"])
    try:
        training = read_tree(folder, "training", parts["training"])
    except Damaged:
        raise
    except InputError as error:  # of other shapes, though the parameters and the config are alike
        raise InputError(
            f"{folder} is of an earlier version, which kept the state of the optimizer, or the one "
            "that train.carry_state carries, in another layout; "
            f"begin another run with its weights: --config.model.init_from={folder}"
        ) from error
    if adapted:
        averaged = training["params"] | {lora.KEY: read_tree(folder, "adapters", parts["adapters"])}
    average = None if like.average is None else tuning.like(like.average, averaged)
    state = TrainState(**{"params": averaged} | training, average=average)
    if folder.parent.name == FOLDER and int(state.step) != int(folder.name):
        raise InputError(
            f"{folder} holds the state of step {int(state.step)}: a copy under another number; "
            "move it out of this folder"
        )
    fix = "move the folder away: the same command then continues from the checkpoint before"
    check_finite(state, str(folder), fix)
    return state


def _on_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy has them, which nothing changes that happens to the tree's own.

    Orbax handles these in half the time, and the Python of a small model's checkpoint takes longer
    than the steps between two. Those of several processes are written as they are, in parts.
    """
    found = jax.device_get(tree)
    if jax.default_backend() == "cpu":  # where these are the memory that the next step overwrites
        found = jax.tree.map(np.array, found)
    return found


def _set_aside(folder: Path) -> Path:
    names = [f"{folder.name}.damaged", *(f"{folder.name}.damaged-{n}" for n in range(2, 1000))]
    return folder.rename(next(p for p in map(folder.with_name, names) if not p.exists()))


def _read_whole(folder: Path) -> None:
    """Find out whether a checkpoint without checksums can be read; one with them was compared."""
    reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    for part in ("params", "training"):
        try:
            reader.restore(folder / part)
        except Exception as error:  # Orbax raises ValueError, Exception and more for what it finds.
            raise Damaged(f"{folder} is damaged ({str(error)[:200]})") from error


def _parts(state: TrainState, evaluated: Any, adapters: Any) -> dict:
    """What is written of a state: "params" to be loaded as a model, "training" to continue."""
    training = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del training["average"]  # if there is one, it is `evaluated`
    parts = {"params": evaluated, "training": training}
    if adapters is not None:
        return parts | {"adapters": adapters}
    if not is_averaged(state.opt_state, state.average):
        del training["params"]
    return parts
