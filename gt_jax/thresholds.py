"""Every threshold by which a run is judged, with where it comes from, and the rules that stop one.

The figures are GroundThink's training guide's and gates'; what differs from them says so.
"""

# A gate, block by block: RWKV's weight, averaged over a batch, and its spread over positions.
GATE_CLOSED = 0.02  # below it, or above 1 - it, one branch has all the weight
GATE_CONSTANT = 0.01  # standard deviation over positions, below which the gate reads no input
COLLAPSE_AFTER = 0.1  # share of a run's steps; a gate starts constant, at model.gate_init

# A criterion of a run passes up to its first number, and warns up to its second.
# Last validation loss over the best, less one.
TREND = {"pass": 0.01, "warn": 0.05}
# Validation loss less training loss, nats.
GAP = {"pass": 0.2, "warn": 0.5}
# Gradient norm of RWKV over that of Mamba: within the first interval, else within the second.
GRADIENT_RATIO = {"pass": (0.3, 3.0), "warn": (0.1, 10.0)}
GRADIENT_RATIO_SHARE = 0.8  # of the rows that must lie in the first
# Variance of a branch's output.
VARIANCE = {"pass": (0.5, 2.0), "warn": (0.1, 10.0)}
# Evaluations since the last best, in mean intervals between bests of the first fifth of a run.
PATIENCE = {"pass": 3.0, "warn": 5.0}
PATIENCE_FROM = 0.2
# Grade of a run: F if a criterion fails, else by how many do not pass.
GRADES = "ABCD"

# Evaluations in a row that rise, the rise in validation loss while the training loss falls, and the
# standard deviation of the last evaluations over their mean.
RISING_EVALUATIONS = 5
RISING_SHARE = 0.05
OSCILLATION = 0.2
OSCILLATION_EVALUATIONS = 5

# Names in train.stop_rules -> when they stop a run.
STOP_RULES = {
    "gap": f"validation loss more than {GAP['warn']:g} nats above training loss",
    "rising": f"validation loss that rises {RISING_EVALUATIONS} times in a row, or by "
    f"{RISING_SHARE:.0%} above its best while the training loss falls",
    "ratio": "gradient norm of RWKV over Mamba's outside {:g} to {:g}".format(
        *GRADIENT_RATIO["warn"]
    ),
    "oscillation": f"standard deviation of the last {OSCILLATION_EVALUATIONS} validation losses "
    f"above {OSCILLATION:.0%} of their mean",
    "collapse": "a block whose gate is closed or constant",
}

# Against a baseline, the V5 gate: each axis good enough, promising, excellent. The loss is a ratio
# to the baseline's at most so high; the others are ratios at least so high (memory: its inverse).
V5_AXES = {
    "loss": (1.15, 1.05, 1.0),
    "statefulness": (1.10, 1.25, 1.50),
    "speed": (1.20, 1.50, 2.0),
    "memory": (1.0, 1.25, 2.0),
}
V5_GRADES = ("below", "good enough", "promising", "excellent")
V5_RED_LINES = {"loss": 1.3, "statefulness": 1.0}  # above; below
V5_SPIKE = 2.0  # a training loss over the mean of the 20 logged before it

# The decision about the next scale: points 0 to 3, times a weight.
MATRIX_WEIGHTS = {"stability": 1.5, "canaries": 1.5, "scaling": 1.0, "resources": 1.0}
MATRIX_GO, MATRIX_CAUTION = 10.0, 8.0
CANARIES = (50.0, 75.0, 85.0)  # % passed, for 1, 2 and 3 points
SCALING_FIT = (0.8, 0.9, 0.95)  # R^2 of the power law; the document gives only the last
PREDICTION_ERROR = (0.5, 0.2, 0.1)  # of the resources, at most


def inside(value: float, bounds: tuple[float, float]) -> bool:
    """Whether a value lies in an interval, its ends included."""
    return bounds[0] <= value <= bounds[1]


def split_rules(text: str) -> list[str]:
    """The names in train.stop_rules."""
    return [name for name in text.replace(" ", "").split(",") if name]
