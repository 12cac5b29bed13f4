"""Several devices: the batch is spread over them, everything else is copied to each.

Each device runs the step function on its own part of the batch and the step sums over devices:
under "jit" by shard_map over a mesh of two axes, "batch" for rows and "sequence" for the tokens of
a row (see `gt_jax.kernels.context_parallel`); under "pmap", which knows rows alone, by pmap. The
compiler could cut a step by itself, but not the Pallas kernels in it: it would gather their inputs
on every device. Every process of a multi-host run makes the whole batch and hands its devices their
part of it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gt_jax import compilation
from gt_jax.data import Batch
from gt_jax.data.batches import Batches
from gt_jax.training.step import TrainState

AXES = ("batch", "sequence")


def make_mesh(sequence: int = 1) -> Mesh:
    """All devices of the run: `sequence` neighbours share each row, which must divide them."""
    shape = (jax.device_count() // sequence, sequence)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)


def state_sharding(mesh: Mesh) -> TrainState:
    """Where a TrainState lives: carried rows with their batch rows, the rest on every device."""
    copied = NamedSharding(mesh, P())
    return _by_part(copied, carry=NamedSharding(mesh, P("batch")))


def compile_train_step(make_step: Callable, mesh: Mesh, mode: str) -> Callable:
    """The train step over all devices; the state given to it is used up.

    Args:
        make_step: axis_name -> train_step(state, batch), see gt_jax.training.step.
        mesh: from `make_mesh`.
        mode: "jit" or "pmap".

    Returns:
        step(state, batch) -> (state, metrics), with a batch from `prefetch`.
    """
    if mode == "jit":
        shardings = state_sharding(mesh)
        parts = _by_part(P(), carry=P("batch"))
        step = make_step(None if mesh.size == 1 else AXES)

        def spread(state, batch):
            specs = (parts, _batch_specs(batch))
            return _by_device(step, mesh, specs, (parts, P()))(state, batch)

        return jax.jit(
            step if mesh.size == 1 else spread,
            in_shardings=(shardings, None),
            out_shardings=(shardings, NamedSharding(mesh, P())),
            donate_argnums=0,
            compiler_options=compilation.options(compilation.TRAINING),
        )

    axes = _by_part(None, carry=0)
    mapped = jax.pmap(
        make_step("batch"), "batch", in_axes=(axes, 0), out_axes=(axes, None), donate_argnums=0
    )
    return lambda state, batch: _pmapped(mapped, state, batch, mesh)


def compile_eval_step(eval_step: Callable, mesh: Mesh) -> Callable:
    """eval_step(params, batch, carry) over all devices, with the batch as NumPy rows of all."""
    return put_batches(_jit_eval_step(eval_step, mesh), mesh)


def put_batches(eval_step: Callable, mesh: Mesh) -> Callable:
    """The eval step of `lower_programs`, compiled, with the batch as NumPy rows of all devices."""
    return lambda params, batch, carry: eval_step(params, put_batch(batch, mesh), carry)


def lower_programs(
    make_state: Any,
    train_step: Any,
    eval_step: Callable,
    mesh: Mesh,
    batches: tuple[Batch, Batch],
    carry: Any,
) -> dict[str, Callable]:
    """What a run compiles, for `gt_jax.compilation.compile_side_by_side`, the longest first.

    Args:
        make_state: jitted, key -> TrainState.
        train_step: from `compile_train_step` in mode "jit".
        eval_step: from `gt_jax.training.step.make_eval_step`.
        mesh: from `make_mesh`.
        batches: a training and an evaluation Batch of NumPy arrays; only their shapes count.
        carry: the zero state of an evaluation, or None.

    Returns:
        "train": train_step(state, batch), "evaluate": eval_step(params, batch, carry) with what
        `put_batch` returns, "init": make_state(key): functions that lower them.
    """
    key = jax.random.key(0)

    def shapes(tree, sharding):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    where, rows = state_sharding(mesh), NamedSharding(mesh, P("batch"))

    def of_batch(batch):
        return jax.tree.map(shapes, batch, _batch_shardings(batch, mesh))

    state = jax.eval_shape(make_state, key)
    parts = {name: shapes(getattr(state, name), getattr(where, name)) for name in vars(state)}
    state = state.replace(**parts)
    training, held_out = map(of_batch, batches)
    carry = shapes(carry, rows)
    evaluate = _jit_eval_step(eval_step, mesh)
    return {
        "train": lambda: train_step.lower(state, training),
        "evaluate": lambda: evaluate.lower(state.params, held_out, carry),
        "init": lambda: make_state.lower(key),
    }


def _jit_eval_step(eval_step, mesh: Mesh):
    if mesh.size == 1:
        return jax.jit(eval_step)
    rows = P("batch")

    def whole_batch(params, batch, carry):
        sums, carry = eval_step(params, batch, carry)
        return jax.lax.psum(sums, AXES), carry

    def spread(params, batch, carry):
        specs = (P(), _batch_specs(batch), rows)
        return _by_device(whole_batch, mesh, specs, (P(), rows))(params, batch, carry)

    return jax.jit(
        spread,
        out_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, rows)),
    )


def prefetch(
    batches: Batches, mesh: Mesh, mode: str, size: int = 16
) -> Iterator[tuple[Batch, dict]]:
    """Training batches where the step wants them, each with the loader's position after it.

    A transfer begins when the device has finished all it was given before; one ahead of every step
    would leave it idle while the host prepares the step. So `size` batches go at once.
    """
    while True:
        ahead = [(next(batches), batches.state()) for _ in range(size)]
        if mode == "jit":
            ahead = [(put_batch(batch, mesh), position) for batch, position in ahead]
        yield from ahead


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A batch of NumPy arrays on the devices, rows and tokens spread over them."""

    def put(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(put, batch, _batch_shardings(batch, mesh))


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B, ...] of the whole batch on the devices, rows spread over them."""
    return jax.device_put(tree, NamedSharding(mesh, P("batch")))


def _batch_specs(batch: Batch) -> Batch:
    """How a batch's arrays are spread: [B, T] over rows and tokens, [B] over rows."""
    return jax.tree.map(lambda x: P(*AXES[: x.ndim]), batch)


def _batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    return jax.tree.map(lambda x: NamedSharding(mesh, P(*AXES[: x.ndim])), batch)


def _by_device(step, mesh: Mesh, in_specs, out_specs):
    # What comes out whole is summed over devices in the step, which the check cannot see.
    return jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _own_rows(x: np.ndarray) -> np.ndarray:
    """The rows of a whole batch that belong to this process's devices."""
    rows = x.shape[0] // jax.process_count()
    return x[jax.process_index() * rows :][:rows]


def _pmapped(mapped, state: TrainState, batch, mesh: Mesh):
    """Call a pmapped step, which wants a leading device axis on every row-wise array."""
    devices = jax.local_device_count()

    def by_device(x):
        return x.reshape(devices, -1, *x.shape[1:])

    batch = jax.tree.map(lambda x: by_device(_own_rows(x)), batch)
    state, metrics = mapped(
        dataclasses.replace(state, carry=jax.tree.map(by_device, state.carry)), batch
    )
    joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state.carry)
    return dataclasses.replace(
        state, carry=jax.device_put(joined, NamedSharding(mesh, P("batch")))
    ), metrics


def _by_part(copied, carry) -> TrainState:
    return TrainState(
        step=copied,
        rng=copied,
        params=copied,
        opt_state=copied,
        average=copied,
        carry=carry,
        skipped=copied,
        skipped_in_a_row=copied,
    )
