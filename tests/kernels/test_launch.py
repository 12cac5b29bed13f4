"""What JAX and XLA know a kernel by: its code, and not its name alone."""

import jax
import jax.numpy as jnp
import pytest

from gt_jax import kernel_programs
from gt_jax.kernels.elementwise import linear_scan
from gt_jax.kernels.pallas import devices, rows
from gt_jax.kernels.pallas.architectures import lowered_for
from tests.kernels.hopper_kernels import too_old

pytestmark = too_old

ROW = rows.Row(32, 4)


@pytest.fixture(autouse=True)
def without_tracebacks():
    """As `compilation.use_cache` sets it: a kernel is the same wherever it is traced."""
    before = jax.config.values["jax_include_full_tracebacks_in_locations"]
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    yield
    jax.config.update("jax_include_full_tracebacks_in_locations", before)


def multiplied_by(number):
    """A function of [4, 128] float32: a kernel whose name does not tell the number."""
    from gt_jax.kernels.pallas import launch

    def body(refs):
        at = (rows.own_row(ROW),), jnp.int32(0)
        x = rows.load(refs.x_gmem, *at, ROW)
        rows.store(refs.y_gmem, *at, number * x, ROW)

    def call(x):
        kinds = {"scratch": {}, "grid": {"blocks": 1}, "threads": 1}
        return launch.kernel(body, name="same", inputs={"x": x}, outputs={"y": x}, **kinds)[0]

    return call


def kernels(function, *shapes):
    """Hashes of the kernels of a program."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with devices.simulated("lower"), jax.enable_x64(False):
        jitted = jax.jit(lambda *z: function(*z))  # which nothing was traced for
        lowered = jitted.trace(*shapes).lower(lowering_platforms=("cuda",))
    return {kernel.hash for kernel in kernel_programs.of_program(lowered)}


def test_kernels_of_one_name_are_as_many_as_their_bodies():
    """XLA compiles one kernel for all that have a hash: a second body would never run."""
    double, triple = multiplied_by(2.0), multiplied_by(3.0)
    (of_double,), (of_triple,) = (kernels(f, (4, 128)) for f in (double, triple))
    both = kernels(lambda x: (double(x), triple(x), multiplied_by(2.0)(x)), (4, 128))
    assert both == {of_double, of_triple} and len(both) == 2
    chosen = lambda x: jax.lax.cond(x[0, 0] > 0, double, triple, x)
    assert kernels(chosen, (4, 128)) == both
    repeated = lambda x: jax.lax.scan(lambda x, _: (double(x), None), x, length=3)[0]
    assert kernels(repeated, (4, 128)) == kernels(jax.checkpoint(double), (4, 128)) == {of_double}


def test_a_gpu_without_clusters_gets_no_kernel_that_was_traced_for_one_with_them():
    shapes, found = [(8, 2048, 128), (8, 2048, 128), (8, 128)], []
    # Gradients are computed in clusters.
    loss = lambda *z: linear_scan.scan(*z).sum()
    gradients = lambda *z: jax.grad(loss, argnums=(0, 1))(*z)
    for capability in ((9, 0), (8, 0), (9, 0)):
        with lowered_for(capability):
            found.append(kernels(gradients, *shapes))
    assert found[0] == found[2] != found[1]
    jax.clear_caches()
    with lowered_for((8, 0)):
        assert kernels(gradients, *shapes) == found[1]
