"""The scans' code for a GPU, run without one: what the interpreter replaces, shuffles between rows
of a warp, sums handed from warp to warp, tiles read ahead, is right and has no races.

    GT_JAX_CUDA_WHEELS=FOLDER pytest tests/kernels/elementwise/test_scan_ptx.py

with the wheels that .ci/cross_compile.py names, of the JAX that is installed.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.pallas import warps
from tests.kernels import emulated, ptx
from tests.kernels.elementwise.linear_scan_cases import (
    NEAR_LASTING as NEAR,
)
from tests.kernels.elementwise.linear_scan_cases import (
    case,
    check,
    gated_in_float64,
    in_float64,
    lasting_case,
    memory_in_float64,
    resets_of,
    scores_of,
)
from tests.kernels.hopper_kernels import too_old

pytestmark = [
    too_old,
    pytest.mark.skipif(not emulated.WHEELS, reason="GT_JAX_CUDA_WHEELS names no folder"),
]
# (B, T, C), multiprocessors, dtype: rows of 2 threads and two tiles, three slabs of channels, two
# splits of three tiles, rows of 32 threads, one short tile.
CALLS = [
    ((2, 1300, 16), 132, "float32"),
    ((2, 1300, 24), 132, "bfloat16"),
    ((1, 4100, 8), 132, "float32"),
    ((2, 150, 128), 4, "float32"),
    ((2, 17, 12), 132, "float32"),
    # Of the gradient tiles are copied ahead: of single blocks, of clusters of 2 in one tile and in
    # many, as far as shared memory has room; of clusters of 4, and of 8.
    ((2, 900, 32), 3, "float32"),
    ((1, 1000, 16), 3, "float32"),
    ((2, 1500, 32), 4, "float32"),
    ((2, 1300, 64), 8, "bfloat16"),
    ((2, 1200, 32), 8, "bfloat16"),
    ((1, 1024, 32), 8, "float32"),
    ((1, 2100, 16), 8, "float32"),
]


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    from gt_jax.kernels.elementwise import linear_scan_rows

    launcher = emulated.Launcher(tmp_path, monkeypatch.setenv)
    monkeypatch.setattr(linear_scan_rows, "kernel", launcher.kernel)
    with jax.enable_x64(False):
        yield launcher


@pytest.fixture(params=CALLS, ids=str)
def drawn(request, monkeypatch):
    """Shape and dtype of a call."""
    shape, running, dtype = request.param
    monkeypatch.setattr(warps, "blocks_at_once", lambda: running * warps.BLOCKS_AT_ONCE)
    return shape, dtype


def test_linear_scans_match_the_recurrence_in_float64(launcher, drawn):
    from gt_jax.kernels.elementwise import linear_scan_kernels as kernels

    shape, _ = drawn
    decay, x, state, g = lasting_case(shape)
    (s,) = emulated.call(kernels.forward, decay, x, state)
    d_decay, dx = emulated.call(kernels.backward, decay, g, jnp.asarray(s), state)
    wanted = in_float64(decay, x, state, g)
    check((s, d_decay, dx), wanted[:3], NEAR["float32"])
    splits = [f"linear_scan_splits_{z}" for z in ("forward", "backward") if shape[1] > 4000]
    assert sorted(launcher.names) == sorted(
        ["linear_scan_forward", "linear_scan_backward", *splits]
    )


def test_gates_match_a_mingru_in_float64(launcher, drawn):
    from gt_jax.kernels.elementwise import gated_scan_kernels as kernels

    (B, T, C), dtype = shape, dtype = drawn
    gates = scores_of(shape, dtype, C, -1)
    resets, head = resets_of(B, T), case(1, 1, C)[2][0]
    _, _, state, g = case(*shape)
    cotangents = g[..., 0], g[:, 1]
    s, last = map(jnp.asarray, emulated.call(kernels.forward, resets, gates, state))
    given = resets, gates, head[None], s, state, *cotangents
    d_gates, d_state, d_head = emulated.call(kernels.backward, *given)
    score, d_head = np.float64(s) @ np.float64(head), np.float64(d_head).sum((0, 1))
    wanted = gated_in_float64(gates, head, state, resets, *cotangents)
    check((score, last, d_gates, d_head, d_state), wanted, NEAR[dtype])


def test_memories_match_the_recurrence_in_float64(launcher, drawn):
    from gt_jax.kernels.elementwise import memory_scan_kernels as kernels

    (B, T, C), dtype = shape, dtype = drawn
    scores = scores_of(shape, dtype, 0, 1)
    rng = np.random.default_rng(3)
    c, ds = jnp.asarray(rng.normal(size=(2, B, T, C)), dtype)
    state, bias, d_last = jnp.asarray(rng.normal(size=(3, B, C)), jnp.float32)
    resets = resets_of(B, T)
    given = resets, scores, c, bias[:1]
    s, last = map(jnp.asarray, emulated.call(kernels.forward, *given, state))
    d_scores, dc, d_bias, d_state = emulated.call(kernels.backward, *given, s, state, ds, d_last)
    found = s, last, d_scores, dc, np.float64(d_bias).sum((0, 1)), d_state
    check(found, memory_in_float64(scores, c, bias[0], state, resets, ds, d_last), NEAR[dtype])


# What is broken in the PTX of the forward pass, and what shows it
BROKEN = {
    "a shuffle goes half as far": (r"(shfl\.sync\.up\.b32.*), 4, 0, -1;", r"\1, 2, 0, -1;", ""),
    "the first row's product": (r"0f3F800000, (%r\d+), (%p\d+);", r"0f40000000, \1, \2;", ""),
    "the product of another warp": (r"\[(%rd\d+)\+32\]", r"[\1+64]", ""),
    "the last row of a warp": (r"(setp\.ne\.b32 \t%p\d+, %r\d+), 30;", r"\1, 28;", ""),
    "no barriers": (r"bar\.sync \t0;", "", "without a barrier"),
    "one buffer for all tiles": (r"shl\.b32 \t(%r\d+), %r\d+, 6;", r"mov.b32 \t\1, 0;", "barrier"),
    "reading too far ahead": (r"min\.u32 (.*), 1299;", r"min.u32 \1, 2047;", "outside"),
}
# The same of the gradient, in clusters of two blocks
BROKEN_CLUSTERS = {
    "no barrier of a cluster": (
        r"barrier\.cluster\.arrive\.aligned;\s+barrier\.cluster\.wait\.aligned;", "", "barrier"
    ),
    "a barrier of a block in its place": (
        r"barrier\.cluster\.arrive\.aligned;\s+barrier\.cluster\.wait\.aligned;", "bar.sync 0;",
        "cluster's barrier",
    ),
    "telling the first block alone": (r"(mapa.*), [^,;]+;", r"\1, 0;", "never written"),
    "not waiting for copies": (r"(wait_group) \t?\d+;", r"\1 63;", "never written"),
}  # fmt: skip


@pytest.mark.parametrize("what", [*BROKEN, *BROKEN_CLUSTERS])
def test_what_is_broken_is_seen(launcher, monkeypatch, what):
    """Of the code itself, so that a right result above means something."""
    from gt_jax.kernels.elementwise import linear_scan_kernels as kernels

    running, shape = (132, (2, 1300, 16)) if what in BROKEN else (4, (2, 1500, 32))
    monkeypatch.setattr(warps, "blocks_at_once", lambda: running * warps.BLOCKS_AT_ONCE)
    pattern, other, message = (BROKEN | BROKEN_CLUSTERS)[what]

    def change(text):
        changed, count = re.subn(pattern, other, text)
        assert count, "nothing to break"
        return changed

    decay, x, state, g = lasting_case(shape)
    run = lambda: emulated.call(kernels.forward, decay, x, state)
    if what in BROKEN_CLUSTERS:
        s = jnp.asarray(run()[0])
        run = lambda: emulated.call(kernels.backward, decay, g, s, state)
    launcher.change = change
    if message:
        with pytest.raises(ptx.Fault, match=message):
            run()
    else:
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check(run(), in_float64(decay, x, state, g)[:1], 1e-3)
