"""Tuning of the portable SSD kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen by measuring."""

    prefetch: bool = False  # the next chunk into the second-level cache
    longest_chain: int = 16  # blocks that add to one sum, each starting after the one before
    ahead: bool = True  # forward: copy the next chunk while this one is computed
    passes: bool = True  # backward in passes over chunks instead of one walk
    heads_together: int = 16  # whose dB and dC a block of a pass adds
    apart: int = 2  # chunks between the states that the forward pass saves for the passes: 1 or 2
    parts: int = 1  # of the batch, whose passes run one part after the other


TUNING = Tuning()


def apart():
    """Chunks between the states that are saved."""
    return TUNING.apart if TUNING.passes else 2
