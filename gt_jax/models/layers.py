"""Small parts that several models share: dense layers, norms, the feed-forward, document bounds."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from jax.typing import DTypeLike

from gt_jax.errors import InputError
from gt_jax.kernels import context_parallel
from gt_jax.kernels.elementwise import gelu_product
from gt_jax.kernels.segments import resets
from gt_jax.models.config import ModelConfig
from gt_jax.models.gelu import gelu

normal = initializers.normal(0.02)

ROUNDED = "rounded"  # name of kernels in the dtype of their product, for jax.checkpoint


def symmetric_uniform(bound: float) -> Initializer:
    """Initialiser U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def fan_in_uniform(scale: float = 1.0) -> Initializer:
    """Initialiser U(+-scale / sqrt(in)) of an [in, out] kernel, PyTorch's default for Linear."""

    def init(key, shape, dtype=jnp.float32):
        return symmetric_uniform(scale * shape[0] ** -0.5)(key, shape, dtype)

    return init


def kernel_init(config: ModelConfig, official: Initializer) -> Initializer:
    """Initialiser of a dense kernel whose source uses `official`."""
    if config.init == "reference":
        return fan_in_uniform() if config.fusion == "gru" else normal
    return normal if config.init == "normal" else official


def output_init(config: ModelConfig, official: Initializer) -> Initializer:
    """Like kernel_init, for the kernel that ends a mixer or feed-forward."""
    return initializers.zeros if config.init == "blinkdl" else kernel_init(config, official)


def branch_output_init(config: ModelConfig, official: Initializer) -> Initializer:
    """Like output_init, for the kernel that ends a mixer: a hybrid's model.branch_start decides."""
    if config.architecture == "hybrid" and config.branch_start == "both":
        return initializers.zeros
    if config.architecture == "hybrid" and config.branch_start == "neither":
        return kernel_init(config, fan_in_uniform(config.layers**-0.5))  # as Mamba-2 ends
    return output_init(config, official)


def embedding_init(config: ModelConfig, official: Initializer | None = None) -> Initializer:
    """Initialiser of an embedding whose source uses `official`, by default N(0, 1/dim).

    The default gives a tied head logits of unit variance; with N(0, 0.02) small hybrids and Mamba-2
    models learn far slower.
    """
    official = official or initializers.normal(config.dim**-0.5)
    small = config.init == "blinkdl" or (config.init == "reference" and config.fusion == "gru")
    return symmetric_uniform(1e-4) if small else kernel_init(config, official)


# An H100 takes about as long to start a product as to read this many numbers: some 3 µs.
_LAUNCH_BOUND = 2**22


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] in the dtype of x.

    Tokens are flattened to one axis for the backward pass: XLA's CPU backend transposes [B, T, D]
    element by element to get the kernel's gradient, which costs more than the product.
    """
    y = x.reshape(-1, x.shape[-1]) @ rounded(kernel, x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def rounded(kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A kernel in the dtype of a product, which model.remat=dots keeps for the backward pass.

    It is 2 bytes a parameter; to round it again would take a small kernel of a GPU for each.
    """
    return checkpoint_name(kernel.astype(dtype), ROUNDED) if kernel.dtype != dtype else kernel


def project_pair(rwkv: jax.Array, mamba: jax.Array, kernel: jax.Array) -> jax.Array:
    """[rwkv; mamba] @ kernel [2D, out], without writing the concatenation."""
    D = rwkv.shape[-1]
    return project(rwkv, kernel[:D]) + project(mamba, kernel[D:])


class Dense(nn.Module):
    """A matrix without bias applied in `dtype`; its float32 kernel is [in, features]."""

    features: int
    dtype: str
    kernel_init: Initializer

    @nn.compact
    def kernel(self, width: int) -> jax.Array:
        return self.param("kernel", self.kernel_init, (width, self.features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x.astype(self.dtype), self.kernel(x.shape[-1]))


def dense(config: ModelConfig, features: int, name: str, init: Initializer) -> Dense:
    """A Dense in the computation dtype."""
    return Dense(features, config.dtype, init, name=name)


def is_launch_bound(x: jax.Array) -> bool:
    """Whether a GPU takes as long to start a product with x [B, T, D] as to compute it.

    One product of stacked matrices then beats several products. XLA's CPU backend is several times
    slower on stacked matrices, except for a single token.
    """
    return x.shape[1] == 1 or (jax.default_backend() == "gpu" and x.size <= _LAUNCH_BOUND)


def apply_each(layers: Sequence[Dense], inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """[layer(x) for every Dense layer and its x]: layers of one shape, all x [B, T, D]."""
    shape = inputs[0].shape
    if not is_launch_bound(inputs[0]) or layers[0].is_initializing():
        return [layer(x) for layer, x in zip(layers, inputs)]
    x = jnp.stack(inputs).reshape(len(layers), -1, shape[-1])
    kernels = jnp.stack([layer.kernel(shape[-1]) for layer in layers])
    return list((x @ rounded(kernels, x.dtype)).reshape(len(layers), *shape[:-1], -1))


def rms_norm(config: ModelConfig, name: str) -> "RMSNorm":
    """RMSNorm with a scale; statistics in float32, result in the computation dtype.

    eps is 1e-6, and 1e-5 in a pure Mamba-2 model, as in published ones.
    """
    epsilon = 1e-5 if config.architecture == "mamba2" else 1e-6
    return RMSNorm(epsilon, config.dtype, name=name)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, [..., D] -> [..., D] in `dtype`."""

    epsilon: float
    dtype: str = "float32"

    @nn.compact
    def weight(self, width: int) -> jax.Array:
        """scale [D] float32."""
        return self.param("scale", initializers.ones, (width,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _scaled_to_unit(x, self.weight(x.shape[-1]), self.epsilon).astype(self.dtype)


def _scaled_to_unit_value(x, scale, epsilon) -> jax.Array:
    return _scaled_to_unit_forward(x, scale, epsilon)[0]


def _scaled_to_unit_forward(x, scale, epsilon):
    """x [..., D] in any dtype, scale [D] -> float32, and what the backward pass needs."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return wide * (inverse * scale), (x, inverse, scale)


def _scaled_to_unit_backward(epsilon, residuals, g):
    # No product here repeats one of the forward pass: on CPUs, XLA would compute it once and keep
    # it, with broadcasts of `scale`, which costs a tenth of a step's memory.
    x, inverse, scale = residuals
    wide, g = x.astype(jnp.float32), g * inverse
    d_scale = jnp.sum(g * wide, axis=tuple(range(g.ndim - 1)))
    along = jnp.matmul(g * wide, scale, precision="highest")[..., None] / x.shape[-1]
    return (g * scale - wide * (jnp.square(inverse) * along)).astype(x.dtype), d_scale


_scaled_to_unit = jax.custom_vjp(_scaled_to_unit_value, nondiff_argnums=(2,))
_scaled_to_unit.defvjp(_scaled_to_unit_forward, _scaled_to_unit_backward)


def layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
    """LayerNorm with scale and bias, eps 1e-5; statistics in float32."""
    return nn.LayerNorm(epsilon=1e-5, dtype=config.dtype, use_fast_variance=False, name=name)


class FeedForward(nn.Module):
    """x [B, T, D] -> W_down gelu(W_up x), four times as wide inside, no bias, exact GELU."""

    config: ModelConfig
    down_init: Initializer = normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        hidden = dense(c, 4 * c.dim, "up", kernel_init(c, normal))(x)  # [B, T, 4D]
        down = dense(c, c.dim, "down", output_init(c, self.down_init))
        if c.remat != "none" and gelu_product.fits(c.impl, hidden):
            return gelu_product.gelu_product(hidden, rounded(down.kernel(4 * c.dim), hidden.dtype))
        return down(gelu(hidden))


def per_row(param: jax.Array, rows: int) -> jax.Array:
    """A parameter [...] repeated for every row of a batch, [rows, ...].

    The gradient sums over time first and over rows in a second step: a single sum over both has too
    few columns for a GPU to compute in parallel.
    """
    return _per_row(param, rows)


_per_row = jax.custom_vjp(
    lambda param, rows: jnp.broadcast_to(param, (rows, *param.shape)), nondiff_argnums=(1,)
)
_per_row.defvjp(
    lambda param, rows: (_per_row(param, rows), None),
    lambda rows, _, g: (jnp.sum(jax.lax.optimization_barrier(g), axis=0),),
)


def sums_over_tokens(*arrays: jax.Array) -> jax.Array:
    """n arrays [..., T, C] of one shape -> [n, C]: sums of groups of tokens, then their sum.

    A single sum has too few columns for a GPU to compute in parallel; the barrier keeps XLA from
    joining the two steps.
    """
    *tokens, channels = arrays[0].shape
    group = math.gcd(math.prod(tokens), 128)
    sums = [jnp.sum(x.reshape(-1, group, channels), axis=1) for x in arrays]
    return jnp.sum(jnp.stack(jax.lax.optimization_barrier(sums)), axis=1)


def recurrence(
    op: Callable, config: ModelConfig, *arrays: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """op(*arrays, **options) for a recurrence `op` of `gt_jax.kernels`, run by config.impl.

    Raises:
        InputError: config.impl cannot run here; the message has the reason that op gives.
    """
    try:
        axis_name = context_parallel.current_axis()
        return op(*arrays, impl=config.impl, axis_name=axis_name, **options)
    except ValueError as error:
        if config.impl == "auto":
            raise
        raise InputError(
            f"model.impl={config.impl}: {error}; model.impl=auto takes the fastest that can"
        ) from error


def record(module: nn.Module, **activations: jax.Array) -> None:
    """Offer named activations of a module to `mutable=["activations"]`; free when nobody asks."""
    if not module.is_initializing():
        for name, value in activations.items():
            module.sow("activations", name, value)


def segment_index(segment_ids: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
    """[B, T] int32: 0 in a row's first segment, 1 in the next and so on."""
    if segment_ids is None:
        # XLA computes sums of constants while it compiles, a second for 65 536 tokens.
        return jnp.zeros(shape, jnp.int32)
    return jnp.cumsum(resets(segment_ids, shape), axis=1, dtype=jnp.int32)


def previous_token(
    x: jax.Array, last: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """The input one token earlier, zero at the first token of a segment.

    Args:
        x: [B, T, D].
        last: [B, D] input before the first token, of the first segment; zeros if None.
        segment_ids: [B, T] int or None.
    """
    B, T, _ = x.shape
    last = inputs_before(x[:, -1], last, segment_ids)
    if last is None:
        last = jnp.zeros_like(x[:, 0])
    before = jnp.concatenate([last[:, None].astype(x.dtype), x[:, :-1]], axis=1)
    if segment_ids is None:
        return before
    return jnp.where(resets(segment_ids, (B, T))[..., None], 0, before)


def inputs_before(
    last: jax.Array, initial: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array | None:
    """The inputs before the first token of x, which a mixer keeps as its state.

    Args:
        last: [B, ...] the last inputs of x.
        initial: [B, ...] those before the sequence, of its first segment, or None for zeros.
        segment_ids: [B, T] int or None.

    Returns:
        `initial`; where devices share a sequence, the inputs that the device before holds.
    """
    axis = context_parallel.current_axis()
    if axis is None:
        return initial
    starts = context_parallel.first_token_resets(segment_ids, axis)
    return context_parallel.from_device_before(last, initial, axis, starts)


def inputs_after(last: jax.Array) -> jax.Array:
    """The last inputs [B, ...] of the whole sequence, from those of x."""
    axis = context_parallel.current_axis()
    return last if axis is None else context_parallel.of_last_device(last, axis)


def over_devices_of_row(x: jax.Array) -> jax.Array:
    """The sum of x [...] over the devices that share a row's tokens; x itself where none do."""
    axis = context_parallel.current_axis()
    return jax.lax.psum(x, axis) if axis else x
