"""Lowering Pallas kernels as for another GPU than the one that is there.

An older GPU's kernel also runs on a newer one, and tests and benchmarks can see there what it
computes and how fast. JAX has no option for it, so this replaces a private function of its own.
"""

import contextlib
from collections.abc import Iterator

OLDEST = (8, 0)  # compute capability that portable kernels need


@contextlib.contextmanager
def lowered_for(capability: tuple[int, int]) -> Iterator[None]:
    """What is lowered inside may use what a GPU of this compute capability, (8, 0), has.

    Raises:
        RuntimeError: this version of JAX no longer asks where this context answers.
    """
    from jax.experimental.mosaic.gpu import utils

    if not hasattr(utils, "_infer_arch"):
        raise RuntimeError("jax.experimental.mosaic.gpu.utils has no _infer_arch to replace")
    before = utils._infer_arch
    utils._infer_arch = lambda: tuple(capability)
    try:
        yield
    finally:
        utils._infer_arch = before
