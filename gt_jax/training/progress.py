"""How a run is going: its best evaluation, its patience, its last losses."""

import dataclasses
import math

from gt_jax.config import Config
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
    losses: list[float] = dataclasses.field(default_factory=list)  # for train.rewind_mads
    suspects: int = 0  # last steps in a row whose loss was one
    rewinds: int = 0
    rewound_from: int | None = None  # step, the last time

    @classmethod
    def of_checkpoint(cls, about: dict, step: int) -> "Progress":
        """As a checkpoint remembers it; older ones name no last evaluation and let NaN be best.

        Raises:
            KeyError, TypeError: it holds something else.
        """
        progress = cls(**{"evaluated": step} | about["progress"])
        for field in dataclasses.fields(cls):
            value = getattr(progress, field.name)
            kind = list if field.name == "losses" else field.type | int
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"progress.{field.name}={value!r}")
        if not all(isinstance(loss, float) for loss in progress.losses):
            raise TypeError("progress.losses holds other things than numbers")
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

    def returned(self) -> dict[str, int]:
        """What rows of metrics.jsonl say of returns to a checkpoint; nothing without any."""
        if self.rewound_from is None:
            return {}
        return {"rewinds": self.rewinds, "rewound_from": self.rewound_from}

    def stops_early(self, config: Config) -> str | None:
        """What of the config ends the run after its last evaluation; None if nothing does."""
        if 0 < config.train.patience <= self.evaluations_since_best:
            return f"train.patience={config.train.patience}"
        rules = split_rules(config.train.stop_rules)
        if self.broken_rule and self.broken_rule.split(":")[0] in rules:
            return f"train.stop_rules ({self.broken_rule})"
        return None
