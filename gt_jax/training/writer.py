"""Checkpoints of a run under way: written in the background by Orbax, restored to continue it.

WORKDIR/checkpoints/STEP/params, about, files.json   as in gt_jax.checkpoint
                         training    step, random key, optimizer, carried state, skip counts
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from gt_jax.checkpoint import FOLDER, read_tree, write_sizes
from gt_jax.training.step import TrainState


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
            about: what belongs with it and JSON can hold; `gt_jax.load` needs its "model",
                "tokenizer" and "config".
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
            self._attempt(lambda: write_sizes(self.folder / str(steps[-1])))

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


def restore(folder: Path, like: TrainState) -> TrainState:
    """The TrainState in a checkpoint folder, placed like `like` (arrays or shapes with shardings).

    Raises:
        InputError: the checkpoint is damaged, or of a model or optimizer of another shape.
    """
    parts = {name: read_tree(folder, name, part) for name, part in _parts(like).items()}
    return TrainState(params=parts["params"], **parts["training"])


def _parts(state: TrainState) -> dict:
    training = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {"params": training.pop("params"), "training": training}
