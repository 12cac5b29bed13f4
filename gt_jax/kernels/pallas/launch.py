"""Starting Pallas kernels, and every difference between JAX versions.

A trap that neither the interpreter nor lowering shows (see devices.py): sums over the rows of an
accumulator (axis 0) go through one scratch area that all warpgroups of a block share, so no two
warpgroups may take one at the same time.
"""

import functools
import inspect
import os
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from gt_jax.kernels.pallas import clusters, early
from gt_jax.kernels.pallas.devices import interpreting, simulation

CHUNK = 64  # tokens a warpgroup works on at once: the rows of one wgmma tile
# JAX 0.11 counts the kernels that it lowers and writes into each, and so into its hash, a name with
# its number, for files about it that XLA writes if asked. One kernel in two programs was two.
_NUMBERED = jax.__version_info__ < (0, 12) and not any(
    variable.startswith("MOSAIC_GPU_DUMP") for variable in os.environ
)
MULTIPROCESSORS = 132  # of an H100 or H200; a block of the grid occupies one


def kernel(
    body: Callable,
    *,
    name: str,
    inputs: dict,
    outputs: dict,
    scratch: dict,
    grid: dict[str, int],
    threads: int,
    updates: dict | None = None,
    cluster: int = 1,
) -> list[jax.Array]:
    """Runs body(refs) on every block of a grid; the body orders its own shared memory accesses.

    Args:
        body: function of one namespace. It holds a reference NAME_gmem for each name of `inputs`,
            `updates` and `outputs`, and scratch references under their own names.
        name: of the kernel, as profilers show it.
        inputs: name -> array, or None for an array that this call has not.
        outputs: name -> jax.ShapeDtypeStruct, or None likewise.
        scratch: name -> type of scratch, or None likewise; shared memory is laid out in this order.
        grid: name -> size of each axis of the grid.
        threads: warpgroups of a block; their axis is "wg".
        updates: name -> array that the kernel overwrites in place, where XLA needs it for nothing
            else: what reads it must run before, which only a dependency ensures.
        cluster: blocks for each of the grid, on the axis clusters.AXIS; see clusters.py.

    Returns:
        The outputs that are not None, in order, and then the updated arrays.
    """
    updates = {key: jax.new_ref(z) for key, z in (updates or {}).items()}
    in_gmem = inputs | updates | outputs
    in_gmem = {f"{key}_gmem": z for key, z in in_gmem.items()}
    names = [key for key, z in (in_gmem | scratch).items() if z is not None]
    absent = dict.fromkeys([key for key, z in (in_gmem | scratch).items() if z is None])
    given = lambda entries: [z for z in entries.values() if z is not None]

    def call(*refs):
        if _NUMBERED and not interpreting():
            _without_number(name)
        body(SimpleNamespace(**absent, **dict(zip(names, refs, strict=True))))

    interpret = False
    if interpreting():
        from jax._src.pallas.mosaic_gpu.interpret import params  # public from JAX 0.12 on

        interpret = params.InterpretGPUParams()
    run = plgpu.kernel(
        call,
        out_type=tuple(given(outputs)),
        scratch_types=given(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=() if cluster == 1 else (cluster,),
        cluster_names=() if cluster == 1 else (clusters.AXIS,),
        num_threads=threads,
        thread_name="wg",
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # approximate exp2
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )
    if early.told() and not updates:
        return early.call(run, given(inputs))
    return [*run(*given(inputs | updates)), *map(jax.freeze, updates.values())]


def _without_number(name: str) -> None:
    """Name the kernel that is traced here, so that JAX does not: it is the same in all programs."""

    @plgpu.inline_mgpu()
    def named(context):
        attributes = context.module.operation.attributes
        attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)

    named()


def lowered_once(*static: str) -> Callable:
    """Decorates a function that calls a kernel: calls of one shape share one lowering.

    Lowering a kernel takes seconds, and the layers of a model would each do it again. A kernel may
    be another on GPUs with clusters, so that those without share none with them.

    Args:
        static: names of hashable arguments that are not arrays.
    """

    def decorate(function):
        signature = inspect.signature(function)

        @functools.partial(jax.jit, static_argnames=("simulation", "clustered", "told", *static))
        def lowered(simulation, clustered, told, **arguments):
            return function(**arguments)

        @functools.wraps(function)
        def call(*args, **options):
            arguments = signature.bind(*args, **options).arguments
            traced_for = {"simulation": simulation(), "clustered": clusters.available()}
            return lowered(told=early.told(), **traced_for, **arguments)

        return call

    return decorate


def batched_as_rows(function: Callable) -> Callable:
    """Makes vmap give `function`, whose arrays all begin with the batch axis, more batch rows.

    For kernels in which blocks of the grid hand numbers to each other: an ordinary vmap would mix
    the numbers of different examples. Arguments may be trees of arrays, and None.
    """

    @jax.custom_batching.custom_vmap
    def rows(*arrays):
        return tuple(function(*arrays))

    @rows.def_vmap
    def _more_rows(size, batched, *arrays):
        def merged(z, has_axis):
            z = z if has_axis else jnp.broadcast_to(z, (size, *z.shape))
            return z.reshape(-1, *z.shape[2:])

        results = rows(*jax.tree.map(merged, arrays, tuple(batched)))
        return tuple(z.reshape(size, -1, *z.shape[1:]) for z in results), (True,) * len(results)

    return rows


def of_models(function: Callable) -> Callable:
    """Makes `function`, whose arrays all begin with an axis of models, one of a single model.

    vmap gives `function` more models. Arguments are as of `batched_as_rows`.
    """
    rows = batched_as_rows(function)
    return lambda *arrays: [z[0] for z in rows(*jax.tree.map(lambda z: z[None], arrays))]


def keep(results: list[jax.Array]) -> list[jax.Array]:
    """Names what a forward pass computed "recurrence", for policies of jax.checkpoint to store."""
    return [checkpoint_name(x, "recurrence") for x in results]


def row_major(x: jax.Array) -> jax.Array:
    """x, whose layout in memory XLA may not choose to suit what reads or writes it."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def release_registers():
    """Gives registers of a warpgroup that only copies to those that compute."""
    plgpu.set_max_registers(24, action="decrease")


def claim_registers():
    """Takes the registers that two computing warpgroups of a block can have."""
    plgpu.set_max_registers(240, action="increase")


def loop(steps, body, carry):
    """carry after body(0, carry) ... body(steps - 1, carry); counts in int32 whatever the flags."""
    return lax.fori_loop(jnp.int32(0), jnp.int32(steps), body, carry)


def divide(n, by):
    """Quotient and remainder of a traced int32 and a number."""
    return lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by))


def wait_for_turn(turns, n, value):
    """Waits until the semaphore turns[n] is `value`: all blocks before have passed it on."""
    plgpu.semaphore_wait(turns.at[n], value, decrement=False, memory_scope="gpu")


def pass_on_turn(turns, n):
    """Counts up the semaphore turns[n], once all that this thread copied has arrived."""
    plgpu.semaphore_signal(turns.at[n], memory_scope="gpu")
