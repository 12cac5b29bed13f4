"""Training batches on the devices before the step wants them."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from gt_jax.data import Batch
from gt_jax.data.batches import Batches
from gt_jax.training.parallel import batch_shardings, put_batch

_SIZE = 16  # batches that are sent at once


def prefetch(batches: Batches, mesh: Mesh, mode: str) -> Iterator[tuple[Batch, dict]]:
    """Training batches where the step wants them, each with the loader's position after it.

    A transfer begins when the device has finished all it was given before; one ahead of every step
    would leave it idle while the host prepares the step. So some batches go at once, to a lone
    device as one array of all inputs, one of all targets and so on, which it takes apart. The first
    are on their way when this returns.

    Args:
        batches: to be read from where they are.
        mesh: from `gt_jax.training.parallel.make_mesh`.
        mode: parallel.mode of the run; "pmap" takes batches as they are.
    """

    def send() -> list[tuple[Batch, dict]]:
        ahead, positions = zip(*[(next(batches), batches.state()) for _ in range(_SIZE)])
        if mode == "jit" and mesh.size == 1:
            whole = jax.tree.map(lambda *x: np.stack(x), *ahead)
            ahead = _apart(jax.device_put(whole, batch_shardings(ahead[0], mesh)))
        elif mode == "jit":
            ahead = [put_batch(batch, mesh) for batch in ahead]
        return list(zip(ahead, positions))

    def after(sent) -> Iterator[tuple[Batch, dict]]:
        while True:
            yield from sent
            sent = send()

    return after(send())


@jax.jit
def _apart(batches: Batch) -> list[Batch]:
    """Batches of a Batch whose arrays have an axis of batches in front."""
    of = lambda i: jax.tree.map(lambda x: x[i], batches)
    return [of(i) for i in range(_SIZE)]
