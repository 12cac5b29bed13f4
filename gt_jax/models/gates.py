"""Where a fusion's gate starts: RWKV's share of the sum, and the bias that gives it."""

import math


def initial_share(fusion):
    """RWKV's share at initialisation, in (0, 1), of a fusion module.

    config.gate_init, or the fusion's own `default_share`, or one half where it has none.
    """
    given = fusion.config.gate_init
    return getattr(fusion, "default_share", 0.5) if given is None else given


def logit(share):
    """Bias whose sigmoid is `share`, in (0, 1); None is one half."""
    return 0.0 if share is None else math.log(share / (1 - share))
