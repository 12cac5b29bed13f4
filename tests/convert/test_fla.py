"""flash-linear-attention's layout: its time-mix in NumPy, from its own tensors, against ours.

The library itself needs a GPU. It joins what belongs to the five inputs, in the order r w k v g,
and norms the heads with eps 1e-5 where RWKV-LM has 64e-5.
"""

import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from gt_jax.models.rwkv6 import TimeMix
from tests.convert import small
from tests.models.small_models import jit


def time_mix(p, x):
    """One row: p tensors by fla's names, x [T, D] -> [T, D]."""
    H, K = p["bonus"].shape
    delta = np.vstack([np.zeros_like(x[:1]), x[:-1]]) - x
    hidden = np.tanh((x + delta * p["x_proj.0.mu"]) @ p["x_proj.0.linear.weight"].T)
    outputs = p["x_proj.2.weight"].reshape(x.shape[1], 5, -1)  # [D, 5, R]
    shares = np.einsum("tnr,dnr->ntd", hidden.reshape(len(x), 5, -1), outputs)
    x_r, x_w, x_k, x_v, x_g = x + delta * (shares + p["x_bias"][:, None])
    r, k, v, g = (
        z @ p[f"{name}_proj.linear.weight"].T for name, z in zip("rkvg", (x_r, x_k, x_v, x_g))
    )
    decay = np.tanh(x_w @ p["w_proj.linear.lora.0.weight"].T) @ p["w_proj.linear.lora.2.weight"].T
    w = np.exp(-np.exp(decay + p["w_proj.linear.lora.2.bias"]))
    r, k, v, w = (z.reshape(-1, H, K) for z in (r, k, v, w))
    state, y = np.zeros((H, K, K)), np.zeros_like(v)
    for t in range(len(x)):
        kv = k[t, :, :, None] * v[t, :, None, :]
        y[t] = np.einsum("hk,hkv->hv", r[t], state + p["bonus"][:, :, None] * kv)
        state = w[t, :, :, None] * state + kv
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y.reshape(x.shape) * p["g_norm.weight"] + p["g_norm.bias"]
    return (y * g / (1 + np.exp(-g))) @ p["o_proj.weight"].T


def test_time_mix_is_fla_s():
    # Small inputs: only then does the eps of the norm of the heads matter.
    x = 0.01 * np.random.default_rng(3).standard_normal((11, 64))
    prefix = "model.layers.1.attn."
    tensors = small.arrays_of("rwkv6", "fla").items()
    p = {n.removeprefix(prefix): np.float64(a) for n, a in tensors if n.startswith(prefix)}
    module = TimeMix(small.MODELS["rwkv6"], layer=1)
    params = small.params_of("rwkv6")["blocks_1"]["rwkv"]
    y, _ = jit(module.apply)({"params": params}, jnp.float32(x)[None])
    assert_allclose(y[0], time_mix(p, x), rtol=1e-4, atol=1e-5)
