"""Several devices: the batch is spread over them; parameters are copied to each, or cut as well.

The devices form a mesh of up to three axes: "batch" and "fsdp" devices hold different rows, and
"sequence" devices different tokens of a row (see `gt_jax.kernels.context_parallel`). Along "fsdp"
they also hold parts of the large parameters, of their moments and gradients (see
`gt_jax.models.fsdp`). Gradients are computed by shard_map, where every device works on its own part
of the batch and the sums are written out: the compiler could cut a step by itself, but not the
Pallas kernels in it, whose inputs it would gather on every device. The update that follows is
element by element, and is left to the compiler.

In mode "pmap", which knows rows alone and one process, the whole step is one pmap. Of several
processes each makes the rows of a batch that its devices need (`own_rows`), and no others.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gt_jax import compilation
from gt_jax.data import Batch
from gt_jax.models import fsdp
from gt_jax.training.placement import one_device, placed
from gt_jax.training.step import Gradients, TrainState


def make_mesh(fsdp: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of the run, or those given, which fsdp * sequence must divide.

    Neighbours share a row, so that what is exchanged most often has the shortest way. Axes of size
    1 are left out.
    """
    number = jax.device_count() if devices is None else len(devices)
    sizes = {"batch": number // (fsdp * sequence), "fsdp": fsdp, "sequence": sequence}
    sizes = {name: size for name, size in sizes.items() if name == "batch" or size > 1}
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def state_sharding(mesh: Mesh, state: TrainState | None = None) -> TrainState:
    """Where a TrainState lives: carried rows with their batch rows, the rest on every device.

    Args:
        mesh: from `make_mesh`.
        state: of arrays or their shapes; needed where the mesh has an axis "fsdp", whose devices
            share what is large.

    Returns:
        A TrainState of `placed`, each for a whole field or, with `state`, for each leaf.
    """
    return _shardings(_state_specs(mesh, state), mesh)


def compile_train_step(
    make_step: Callable,
    mesh: Mesh,
    mode: str,
    state: TrainState | None = None,
    *,
    activation: int,
    kernels: bool = True,
) -> Callable:
    """The train step over all devices; the state given to it is used up.

    Args:
        make_step: (axis_name, spread) -> train_step(state, batch), see gt_jax.training.step.
        mesh: from `make_mesh`.
        mode: "jit" or "pmap".
        state: as for `state_sharding`.
        activation: numbers of one activation, tokens x width; says how a lone GPU compiles.
        kernels: whether Pallas kernels compute the recurrences; says how GPUs compile.

    Returns:
        step(state, batch) -> (state, metrics), with a batch from `prefetch`.
    """
    if mode == "jit":
        shardings = state_sharding(mesh, state)
        one = mesh.size == 1
        options = compilation.training(activation, kernels=kernels, devices=mesh.size)
        return jax.jit(
            make_step() if one else make_step(mesh.axis_names, lambda f: _spread(f, mesh)),
            in_shardings=(shardings, None),
            out_shardings=(shardings, placed(mesh, P())),
            donate_argnums=0,
            compiler_options=compilation.options(options),
        )

    axes = _by_part(None, carry=0)
    mapped = jax.pmap(
        make_step("batch"), "batch", in_axes=(axes, 0), out_axes=(axes, None), donate_argnums=0
    )
    return lambda state, batch: _pmapped(mapped, state, batch, mesh)


def _spread(gradients: Callable, mesh: Mesh) -> Callable:
    """`gradients` of gt_jax.training.step, each device on its part of the batch."""

    def spread(params, carry, batch, rng, step):
        rows, cut = P(_row_axes(mesh)), _param_specs(params, mesh)
        specs = (cut, rows, _batch_specs(batch, mesh), P(), P())
        each: list[Any] = [cut, P(), P(), P(), rows, P()]
        found = Gradients(*each)
        return _by_device(gradients, mesh, specs, found)(params, carry, batch, rng, step)

    return spread


def compile_eval_step(eval_step: Callable, mesh: Mesh) -> Callable:
    """eval_step(params, batch, carry) over all devices, with the batch as `put_batch` takes it."""
    return put_batches(_jit_eval_step(eval_step, mesh), mesh)


def put_batches(eval_step: Callable, mesh: Mesh) -> Callable:
    """The eval step of `lower_programs`, compiled, with the batch as NumPy rows of the process."""
    # XLA's CPU backend runs everything in one pool of threads, where several programs in flight
    # that exchange sums can wait for each other until it gives up.
    ready = mesh.size > 1 and jax.default_backend() == "cpu"

    def step(params, batch, carry):
        found = eval_step(params, put_batch(batch, mesh), carry)
        return jax.block_until_ready(found) if ready else found

    return step


def lower_programs(
    make_state: Any,
    train_step: Any,
    eval_step: Callable,
    mesh: Mesh,
    batches: tuple[Batch, Batch],
    carry: Any,
    sample: Mapping[str, Callable],
) -> dict[str, Callable]:
    """What a run compiles: the longest first, then what the first step needs besides.

    Args:
        make_state: jitted, seed [] uint32 -> TrainState.
        train_step: from `compile_train_step` in mode "jit".
        eval_step: from `gt_jax.training.step.make_eval_step`.
        mesh: from `make_mesh`.
        batches: a training and an evaluation Batch as for `put_batch`; only their shapes count.
        carry: the zero state of an evaluation, or None.
        sample: name -> (shapes of the parameters to evaluate, on `one_device`) -> a program of a
            sample, lowered.

    Returns:
        "train": train_step(state, batch), "init": make_state(seed), "evaluate": eval_step(params,
        batch, carry) with what `put_batch` returns, and those of a sample: functions that lower
        them.
    """
    seed = jax.ShapeDtypeStruct((), np.uint32)

    @functools.cache  # nothing of it is needed for programs that are kept
    def states():
        state = jax.eval_shape(make_state, seed)
        state = shapes_on(state_sharding(mesh, state), state)
        # An average of schedule-free's is computed, which shapes alone cannot be.
        evaluated = jax.eval_shape(lambda s: s.evaluated, state)
        return state, shapes_on(_shardings(_param_specs(evaluated, mesh), mesh), evaluated)

    whole = lambda x: jax.ShapeDtypeStruct((_whole(mesh, x)[0], *x.shape[1:]), x.dtype)
    training, held_out = (
        shapes_on(batch_shardings(batch, mesh), jax.tree.map(whole, batch)) for batch in batches
    )
    carry = shapes_on(placed(mesh, P(_row_axes(mesh))), carry)
    evaluate = _jit_eval_step(eval_step, mesh)
    of_sample = lambda lower: lambda: lower(shapes_on(one_device(mesh), states()[1]))
    return {
        "train": lambda: train_step.lower(states()[0], training),
        "init": lambda: make_state.lower(seed),
        "evaluate": lambda: evaluate.lower(states()[1], held_out, carry),
    } | {name: of_sample(lower) for name, lower in sample.items()}


def shapes_on(shardings: Any, tree: Any) -> Any:
    """Shapes of the arrays of a tree, placed as a prefix of the tree says."""

    def place(sharding, part):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(place, shardings, tree)


def _jit_eval_step(eval_step, mesh: Mesh):
    options = compilation.options(compilation.UNTIMED)
    if mesh.size == 1:
        return jax.jit(eval_step, compiler_options=options)
    rows = P(_row_axes(mesh))

    def whole_batch(params, batch, carry):
        sums, carry = eval_step(params, batch, carry)
        return jax.lax.psum(sums, mesh.axis_names), carry

    def spread(params, batch, carry):
        specs = (_param_specs(params, mesh), _batch_specs(batch, mesh), rows)
        return _by_device(whole_batch, mesh, specs, (P(), rows))(params, batch, carry)

    shardings = NamedSharding(mesh, P()), NamedSharding(mesh, rows)
    return jax.jit(spread, out_shardings=shardings, compiler_options=options)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A batch on the devices, rows and tokens spread over them.

    Args:
        batch: NumPy arrays of the rows in `own_rows`: in a single process of all rows.
        mesh: from `make_mesh`.
    """

    def put(x, sharding):
        rows, first = _whole(mesh, x)

        def of_device(index):
            start, stop, _ = index[0].indices(rows)
            return x[start - first : stop - first, *index[1:]]

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, of_device)

    return jax.tree.map(put, batch, batch_shardings(batch, mesh))


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B, ...] of the whole batch on the devices, rows spread over them."""
    return jax.device_put(tree, placed(mesh, P(_row_axes(mesh))))


def put_whole(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, on the devices of all processes."""

    def put(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(put, tree, shardings)


def own_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a batch that this process's devices need; all in a single process."""
    rows = NamedSharding(mesh, P(_row_axes(mesh)))
    places = rows.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in places if index]
    return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))


def _whole(mesh: Mesh, x: np.ndarray) -> tuple[int, int]:
    """Rows of the whole batch, and the first that this process has, of an array of its rows."""
    shards = math.prod(mesh.shape[name] for name in _row_axes(mesh))
    own = own_rows(mesh, shards)
    each = x.shape[0] // (own.stop - own.start)
    return shards * each, own.start * each


def _row_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name in mesh.axis_names if name != "sequence")


def _batch_specs(batch: Batch, mesh: Mesh) -> Batch:
    """How a batch's arrays are spread: [B, T] over rows and tokens, [B] over rows."""
    axes = (_row_axes(mesh), "sequence" if "sequence" in mesh.axis_names else None)
    return jax.tree.map(lambda x: P(*axes[: x.ndim]), batch)


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Where each array of a batch lives: [B, T] spread over rows and tokens, [B] over rows."""
    return _shardings(_batch_specs(batch, mesh), mesh)


def _param_specs(tree: Any, mesh: Mesh) -> Any:
    """How parameters, or what is shaped like them, are cut: a spec for each leaf."""

    def spec(path, leaf):
        axis = fsdp.cut_axis(path, leaf.ndim) if fsdp.AXIS in mesh.axis_names else None
        return P() if axis is None else P(*[None] * axis, fsdp.AXIS)

    return jax.tree_util.tree_map_with_path(spec, tree)


def _state_specs(mesh: Mesh, state: TrainState | None) -> TrainState:
    specs = _by_part(P(), carry=P(_row_axes(mesh)))
    if state is None:
        return specs
    cut = ("params", "opt_state", "average")
    return dataclasses.replace(
        specs, **{name: _param_specs(getattr(state, name), mesh) for name in cut}
    )


def _shardings(specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: placed(mesh, x), specs, is_leaf=lambda x: isinstance(x, P))


def _by_device(function, mesh: Mesh, in_specs, out_specs):
    # What comes out whole is summed over devices in it, which the check cannot see.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _pmapped(mapped, state: TrainState, batch, mesh: Mesh):
    """Call a pmapped step, which wants a leading device axis on every row-wise array."""
    devices = jax.local_device_count()

    def by_device(x):
        return x.reshape(devices, -1, *x.shape[1:])

    batch = jax.tree.map(by_device, batch)
    state, metrics = mapped(
        dataclasses.replace(state, carry=jax.tree.map(by_device, state.carry)), batch
    )
    joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state.carry)
    return dataclasses.replace(state, carry=put_rows(joined, mesh)), metrics


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
