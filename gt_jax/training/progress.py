"""How a run is going: its best evaluation, its patience, and steps that were not finite."""

import collections
import dataclasses
import math

import jax

from gt_jax.config import Config
from gt_jax.errors import InputError
from gt_jax.thresholds import split_rules


@dataclasses.dataclass
class Progress:
    """What the evaluations of a run said; a checkpoint remembers it."""

    best_loss: float | None = None  # of the finite ones
    best_step: int | None = None
    last_loss: float | None = None
    evaluations_since_best: int = 0
    evaluated: int = 0  # step of the last evaluation
    broken_rule: str | None = None  # of train.stop_rules, "name: reason" at the last evaluation

    @classmethod
    def of_checkpoint(cls, about: dict, step: int) -> "Progress":
        """As a checkpoint remembers it; older ones name no last evaluation and let NaN be best."""
        progress = cls(**{"evaluated": step} | about["progress"])
        if progress.best_loss is not None and not math.isfinite(progress.best_loss):
            progress.best_loss = progress.best_step = None
        return progress

    def update(self, step: int, loss: float) -> bool:
        """Take in an evaluation; True if it is the best so far. One that is not finite never is."""
        self.last_loss, self.evaluated = loss, step
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            self.evaluations_since_best += 1
            return False
        self.best_loss, self.best_step, self.evaluations_since_best = loss, step, 0
        return True

    def stops_early(self, config: Config) -> str | None:
        """What of the config ends the run after its last evaluation; None if nothing does."""
        if 0 < config.train.patience <= self.evaluations_since_best:
            return f"train.patience={config.train.patience}"
        rules = split_rules(config.train.stop_rules)
        if self.broken_rule and self.broken_rule.split(":")[0] in rules:
            return f"train.stop_rules ({self.broken_rule})"
        return None


class FiniteWatch:
    """Ends a run after train.max_nonfinite steps in a row that were not finite.

    The count of a step is read two steps later, so that the device never waits for the host, and
    all processes of a run end at the same step.
    """

    def __init__(self, config: Config):
        self._config = config
        self._counts = collections.deque()

    def add(self, skipped_in_a_row: jax.Array) -> None:
        """Take in the count [] int32 after a step that may still be running.

        Raises:
            InputError: an earlier step's count reached the limit.
        """
        skipped_in_a_row.copy_to_host_async()
        self._counts.append(skipped_in_a_row)
        if len(self._counts) > 2:
            self._check(int(self._counts.popleft()))

    def finish(self) -> None:
        """Look at the steps not looked at yet. Raises InputError as `add` does."""
        while self._counts:
            self._check(int(self._counts.popleft()))

    def _check(self, count: int) -> None:
        limit = self._config.train.max_nonfinite
        if count >= limit:
            raise InputError(
                f"the last {count} steps were not finite in loss or gradient "
                f"(train.max_nonfinite={limit}); lower optim.lr={self._config.optim.lr}"
            )
