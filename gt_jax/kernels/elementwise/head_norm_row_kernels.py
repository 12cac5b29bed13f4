"""Pallas kernels of a norm over the channels of each head, gated: forward and backward.

With c = y - mean(y), i = 1 / sqrt(mean(c^2) + epsilon), z = c i scale + bias and q = sigmoid(g):

    out = z g q;   dg = dout z q (1 + g (1 - q));   dz = dout g q;   dscale = sum_t dz c i
    dbias = sum_t dz;   dn = dz scale;   dy = i (dn - mean(dn) - c i mean(dn c i))

A row of threads (pallas/rows.py) holds a head of a token and walks tokens with the same head, so
that scale, bias and their gradients stay in registers. Neighbouring rows take neighbouring heads.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gt_jax.kernels.pallas import rows
from gt_jax.kernels.pallas.launch import MULTIPROCESSORS, kernel, loop, lowered_once

_VECTOR = 8  # neighbouring channels of a thread: 16 bytes of bfloat16
BLOCKS = {"forward": 8 * MULTIPROCESSORS, "backward": 5 * MULTIPROCESSORS}  # of the grid, at most


class Grid(NamedTuple):
    """How tokens and heads are divided among rows of threads."""

    row: rows.Row
    sections: int  # parts of a head that a row reads at once
    blocks: int
    stride: int  # tokens from one step of a row to the next
    steps: int  # tokens that a row walks
    tokens: int
    heads: int


def _grid_for(y, direction):
    """y [M, B, T, H, V]."""
    _, *tokens, heads, width = y.shape
    tokens, parts = math.prod(tokens), width // _VECTOR
    row = rows.Row(parts & -parts, _VECTOR)  # a power of two
    together = heads // math.gcd(heads, row.number)  # blocks whose rows are whole tokens
    most = max(1, BLOCKS[direction] // together)
    stride = together * row.number // heads
    groups = min(most, pl.cdiv(tokens, stride))
    stride *= groups
    steps = pl.cdiv(tokens, stride)
    return Grid(row, width // row.channels, groups * together, stride, steps, tokens, heads)


class _Row:
    """A row of threads: what it reads and where it writes."""

    def __init__(self, grid):
        self.grid, self.row, self.model = grid, grid.row, lax.axis_index("models")
        self.number = lax.axis_index("rows") * grid.row.number + rows.own_row(grid.row)
        self.first = lax.div(self.number, jnp.int32(grid.heads))
        self.head = lax.rem(self.number, jnp.int32(grid.heads))
        self.columns = [jnp.int32(i * self.row.channels) for i in range(grid.sections)]

    def kept(self, n):
        """Whether there is a token at step n; None where there always is."""
        grid = self.grid
        if grid.steps * grid.stride == grid.tokens:
            return None
        return self.first + n * grid.stride < grid.tokens

    def at(self, n):
        token = self.first + jnp.minimum(n, self.grid.steps - 1) * self.grid.stride
        token = jnp.minimum(token, self.grid.tokens - 1)
        return self.model, token * self.grid.heads + self.head

    def read(self, ref, n, keep=None):
        return tuple(rows.load(ref, self.at(n), c, self.row, keep) for c in self.columns)

    def write(self, ref, n, values):
        for c, z in zip(self.columns, values):
            rows.store(ref, self.at(n), c, z.astype(jnp.bfloat16), self.row, self.kept(n))

    def parameter(self, ref):
        return [rows.load(ref, (self.model, self.head), c, self.row) for c in self.columns]

    def means(self, *values):
        """The mean over the head of each value, sections of a head."""
        width = self.grid.sections * self.row.channels
        sums = [sum(z[1:], z[0]) for z in values]
        # Rows are shorter than a warp: nothing goes through shared memory.
        return [
            z * (1 / width) for z in rows.sums_over_row(sums, self.row, self.scratch, self.turn)
        ]

    def normalised(self, y, epsilon):
        """A head of mean 0 and variance 1, and what it was multiplied by."""
        (mean,) = self.means(y)
        c = [z - mean for z in y]
        (variance,) = self.means([z * z for z in c])
        inverse = lax.rsqrt(variance + epsilon)
        return [z * inverse for z in c], inverse


def _wide(values):
    return [z.astype(jnp.float32) for z in values]


def _flat(z, width):
    """[M, tokens x heads, width]."""
    return z.reshape(z.shape[0], -1, width)


@lowered_once("epsilon")
def gated(
    y: jax.Array, g: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float
) -> list[jax.Array]:
    """The gated norm.

    Args:
        y: [M, B, T, H, V] bfloat16 of M models, V a multiple of 8.
        g: [M, B, T, H V] bfloat16 gate.
        scale, bias: [M, H V] float32.
        epsilon: added to the variance.

    Returns:
        One array like g.
    """
    models, width = y.shape[0], y.shape[-1]
    grid = _grid_for(y, "forward")

    def body(refs):
        here = _Row(grid)
        here.scratch, here.turn = refs.sums, jnp.int32(0)
        scale, bias = here.parameter(refs.scale_gmem), here.parameter(refs.bias_gmem)
        read = lambda n: (here.read(refs.y_gmem, n), here.read(refs.g_gmem, n))

        def step(n, values):
            following = read(n + 1)  # arrives while this token is computed
            y, g = map(_wide, values)
            normal, _ = here.normalised(y, epsilon)
            z = [x * s + b for x, s, b in zip(normal, scale, bias)]
            here.write(refs.out_gmem, n, [z * (g * rows.sigmoid(g)) for z, g in zip(z, g)])
            return following

        loop(grid.steps, step, read(jnp.int32(0)))

    (out,) = kernel(
        body,
        name="head_norm",
        inputs={
            "y": _flat(y, width),
            "g": _flat(g, width),
            "scale": _flat(scale, width),
            "bias": _flat(bias, width),
        },
        outputs={"out": jax.ShapeDtypeStruct(_flat(y, width).shape, jnp.bfloat16)},
        scratch={"sums": rows.sums_scratch(1)},
        grid={"models": models, "rows": grid.blocks},
        threads=1,
    )
    return [out.reshape(g.shape)]


@lowered_once("epsilon")
def gradients(
    y: jax.Array,
    g: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    dout: jax.Array,
    *,
    epsilon: float,
) -> list[jax.Array]:
    """Gradients of `gated`.

    Args:
        y, g, scale, bias, epsilon: as of `gated`.
        dout: like g.

    Returns:
        dy like y and dg like g; sums over stretches of tokens, to be added over the second axis,
        of dscale and of dbias: [M, S, H V] float32 each.
    """
    models, width = y.shape[0], y.shape[-1]
    grid = _grid_for(y, "backward")
    row = grid.row

    def body(refs):
        here = _Row(grid)
        here.scratch, here.turn = refs.sums, jnp.int32(0)
        scale, bias = here.parameter(refs.scale_gmem), here.parameter(refs.bias_gmem)

        def read(n):
            # Zeros where there is no token, which then adds nothing to any sum.
            dout = here.read(refs.dout_gmem, n, here.kept(n))
            return here.read(refs.y_gmem, n), here.read(refs.g_gmem, n), dout

        def step(n, carry):
            values, of_scale, of_bias = carry
            following = read(n + 1)  # arrives while this token is computed
            y, g, dout = map(_wide, values)
            normal, inverse = here.normalised(y, epsilon)
            dz, dg = [], []
            for x, s, b, gate, d in zip(normal, scale, bias, g, dout):
                q = rows.sigmoid(gate)
                dg.append(d * (x * s + b) * (q * (1 + gate * (1 - q))))
                dz.append(d * (gate * q))
            here.write(refs.dg_gmem, n, dg)
            dn = [z * s for z, s in zip(dz, scale)]
            mean, along = here.means(dn, [z * x for z, x in zip(dn, normal)])
            dy = [inverse * (z - mean - x * along) for z, x in zip(dn, normal)]
            here.write(refs.dy_gmem, n, dy)
            of_scale = tuple(t + z * x for t, z, x in zip(of_scale, dz, normal))
            return following, of_scale, tuple(t + z for t, z in zip(of_bias, dz))

        zeros = tuple(rows.zeros(row) for _ in here.columns)
        _, *sums = loop(grid.steps, step, (read(jnp.int32(0)), zeros, zeros))
        for ref, total in zip((refs.dscale_gmem, refs.dbias_gmem), sums):
            for c, z in zip(here.columns, total):
                rows.store(ref, (here.model, here.number), c, z, row)

    wide = jax.ShapeDtypeStruct(_flat(y, width).shape, jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((models, grid.blocks * row.number, width), jnp.float32)
    dy, dg, *sums = kernel(
        body,
        name="head_norm_gradients",
        inputs={
            "y": _flat(y, width),
            "g": _flat(g, width),
            "scale": _flat(scale, width),
            "bias": _flat(bias, width),
            "dout": _flat(dout, width),
        },
        outputs={"dy": wide, "dg": wide, "dscale": sums, "dbias": sums},
        scratch={"sums": rows.sums_scratch(2)},
        grid={"models": models, "rows": grid.blocks},
        threads=1,
    )
    by_head = (models, -1, grid.heads * width)
    return [dy.reshape(y.shape), dg.reshape(g.shape), *(z.reshape(by_head) for z in sums)]
