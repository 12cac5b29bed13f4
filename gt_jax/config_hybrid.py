"""Settings of how a hybrid's two branches learn: auxiliary losses, and the pace of each part."""

from dataclasses import dataclass

from gt_jax.errors import InputError
from gt_jax.settings import ABOVE_ZERO, NOT_NEGATIVE, SHARE, setting


@dataclass(frozen=True)
class PartSteps:
    """Numbers of updates, by part of the model."""

    rwkv: int = setting(0, "of the RWKV branches", NOT_NEGATIVE)
    mamba: int = setting(0, "of the Mamba branches", NOT_NEGATIVE)
    gate: int = setting(0, "of the fusions", NOT_NEGATIVE)


@dataclass(frozen=True)
class Debate:
    """debate.*: losses of the branches besides the task's; see gt_jax.training.debate."""

    diversity_weight: float = setting(
        0.0, "of the term that wants the branches' outputs to differ in direction", NOT_NEGATIVE
    )
    diversity: str = setting(
        "orthogonal",
        "cos^2 of the branches, least where they are orthogonal; published: (1 + cos) / 2 of their"
        " means over blocks, least where one is the negative of the other",
        choices=("orthogonal", "published"),
    )
    arbiter_weight: float = setting(
        0.0, "of the term that wants the fusion to weigh the better branch more", NOT_NEGATIVE
    )
    arbiter_target: str = setting(
        "task",
        "what better means: task, a lower loss when the branch alone is decoded by the output head;"
        " published: nearer to the fused output (mix) or to the last block's output (final)",
        choices=("task", "mix", "final"),
    )
    arbiter_temperature: float = setting(
        1.0, "nats by which a branch must be better to get 73 % of the weight", ABOVE_ZERO
    )
    branch_weight: float = setting(
        0.0, "of the mean task loss of the branches, each decoded alone", NOT_NEGATIVE
    )
    blocks: str = setting(
        "last",
        "the blocks where branches are decoded alone, for the arbiter's target and branch_weight:"
        " last, all, or numbers such as 3,7 (each costs two passes through the output head)",
    )
    entropy_weight: float = setting(
        0.0, "of the term of the entropy H of the two weights at a position", NOT_NEGATIVE
    )
    entropy: str = setting(
        "mixing",
        "1 - H / ln 2, least where both branches weigh the same; published: H, least where one"
        " branch has all the weight",
        choices=("mixing", "published"),
    )
    balance_weight: float = setting(
        0.0,
        "of (s - 1/2)^2 summed over blocks, s being RWKV's part of the squared norm of the update,"
        " averaged over a row",
        NOT_NEGATIVE,
    )
    schedule: str = setting(
        "constant",
        "what multiplies the weights at progress p, from 0 to 1: constant: 1; fade: 1 until"
        " fade_from, then linearly to 0 at fade_to; exponential: e^(-3 p)",
        choices=("constant", "fade", "exponential"),
    )
    fade_from: float = setting(1 / 3, "progress at which a fade begins", SHARE)
    fade_to: float = setting(2 / 3, "progress at which a fade has reached 0", SHARE)

    def __post_init__(self):
        # Where the laboratory sweeps them they are arrays.
        numbers = isinstance(self.fade_from, float) and isinstance(self.fade_to, float)
        if numbers and self.fade_from > self.fade_to:
            raise InputError(
                f"debate.fade_from={self.fade_from:g} must be at most "
                f"debate.fade_to={self.fade_to:g}"
            )
