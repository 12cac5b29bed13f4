"""Tuning of the portable SSD kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen by measuring."""

    prefetch: bool = False  # the next chunk into the second-level cache
    longest_chain: int = 16  # blocks that add to one sum, each starting after the one before
    ahead: bool = False  # forward: copy the next chunk while this one is computed
    passes: bool = True  # backward in passes over chunks instead of one walk
    heads_together: int = 16  # whose dB and dC a block of a pass adds


TUNING = Tuning()
