"""The columns that causal_conv.py and its kernels divide."""

from typing import NamedTuple

WIDTH = 4  # tokens that the convolution sees
_ALIGNED = 8  # 16-bit numbers that a thread reads at once


class Sizes(NamedTuple):
    """Columns of the projection: z and values have `inner` each, B and C `state`, dt `heads`."""

    inner: int
    state: int
    heads: int

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.state

    @property
    def padded_width(self) -> int:
        """Columns of a projection whose rows are aligned."""
        width = self.inner + self.channels + self.heads
        return -(-width // _ALIGNED) * _ALIGNED
