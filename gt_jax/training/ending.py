"""The end of a run: curve.png, drawn while the last checkpoint is written, is put there last.

By the step in it the next start of the command finds that nothing is left to do.
"""

from pathlib import Path

from gt_jax.config import Config
from gt_jax.data.corpora import replace_file
from gt_jax.scoring import loss_unit
from gt_jax.training import plot, watch
from gt_jax.training.display import say
from gt_jax.training.job import Job
from gt_jax.training.progress import Progress
from gt_jax.training.samples import Samples

_CURVE = "curve.png"


def is_finished(config: Config, folder: Path, start: int, progress: Progress) -> bool:
    """Whether the run's last step is done, and all that comes after it."""
    steps = config.train.steps
    if start > steps or (start < steps and not progress.stops_early(config)):
        return start > steps
    sampled = not config.train.sample_tokens or Samples(folder, start=start).last == start
    return progress.evaluated == start and sampled and plot.step_of(folder / _CURVE) == start


def curve_of(job: Job) -> bytes | None:
    """A run's curve as a PNG file; None, with a line that says why, if it cannot be drawn."""
    unit = f"nats per {loss_unit(job.text.tokenizer)}"
    title = f"{job.config.model.preset} on {job.text.corpus.name}"
    judged_from = watch.judged_from(job.config)
    try:
        return plot.draw_curve(job.folder, title=title, unit=unit, judged_from=judged_from)
    except (ValueError, OSError) as error:
        return _say_why(error)


def keep_curve(job: Job, curve: bytes | None) -> None:
    """Write curve.png; to be called when all else is on disk and old checkpoints are gone."""
    if curve is None:
        return
    try:
        replace_file(job.folder / _CURVE, curve)
    except OSError as error:
        _say_why(error)


def _say_why(error: Exception) -> None:
    say(f"{_CURVE} is not drawn: {' '.join(str(error).split())}")
