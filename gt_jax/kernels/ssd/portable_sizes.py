"""Tuning of the portable SSD kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen by measuring."""

    prefetch: bool = False  # the next chunk into the second-level cache
    longest_chain: int = 16  # blocks that add to one sum, each starting after the one before


TUNING = Tuning()
