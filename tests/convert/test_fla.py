"""flash-linear-attention's layouts: its mixers in NumPy, from its own tensors, against ours.

The library itself needs a GPU. In RWKV-6 it joins what belongs to the five inputs, in the order
r w k v g, and norms the heads with eps 1e-5 where RWKV-LM has 64e-5. Its Mamba-2 has the names of
transformers' tensors and settings of its own.
"""

import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

import gt_jax
from gt_jax.convert import files, import_model
from gt_jax.models.rwkv6 import TimeMix
from tests.convert import small
from tests.convert.test_settings import FLA_MAMBA2
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


def rms_norm(x, scale, eps=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def mamba2_mixer(p, x, N):
    """One row, one step at a time in float64, with fla's defaults: the gate first, then the norm.

    p: tensors by fla's names; x [T, D] -> [T, D].
    """
    H, E = len(p["A_log"]), len(p["norm.weight"])
    z, xBC, dt = np.split(x @ p["in_proj.weight"].T, [E, 2 * E + 2 * N], axis=-1)
    window = np.vstack([np.zeros((3, xBC.shape[1])), xBC])
    taps = p["conv1d.weight"][:, 0]  # [channels, 4]
    xBC = silu(sum(window[i : i + len(x)] * taps[:, i] for i in range(4)) + p["conv1d.bias"])
    values, B, C = np.split(xBC, [E, E + N], axis=-1)
    values = values.reshape(len(x), H, -1)
    dt = np.log1p(np.exp(dt + p["dt_bias"]))  # [T, H]; dt_limit is no limit
    state, y = np.zeros((H, E // H, N)), np.zeros_like(values)
    for t in range(len(x)):
        decay = np.exp(-dt[t] * np.exp(p["A_log"]))
        new = dt[t][:, None, None] * values[t][:, :, None] * B[t]
        state = decay[:, None, None] * state + new
        y[t] = state @ C[t] + p["D"][:, None] * values[t]
    return rms_norm(y.reshape(len(x), E) * silu(z), p["norm.weight"]) @ p["out_proj.weight"].T


def test_mamba2_of_fla_s_settings_is_its_recurrence(tmp_path):
    arrays = small.arrays_of("mamba2", "mamba2-hf")
    files.write_folder(tmp_path / "theirs", "pytorch_model.bin", arrays, FLA_MAMBA2)
    import_model(tmp_path / "theirs", tmp_path / "ours")
    model, params, _ = gt_jax.load(tmp_path / "ours")
    tokens = np.random.default_rng(4).integers(0, small.VOCAB, 13)
    ours = jit(model.apply)({"params": params}, tokens[None]).logits[0]

    p = {name: np.float64(array) for name, array in arrays.items()}
    x = p["backbone.embeddings.weight"][tokens]
    for layer in range(2):
        prefix = f"backbone.layers.{layer}."
        mixer = {n.removeprefix(f"{prefix}mixer."): a for n, a in p.items() if "mixer" in n}
        mixer = {n: a for n, a in mixer.items() if not n.startswith("backbone")}
        x = x + mamba2_mixer(mixer, rms_norm(x, p[f"{prefix}norm.weight"]), N=16)
    theirs = rms_norm(x, p["backbone.norm_f.weight"]) @ p["lm_head.weight"].T
    assert np.abs(theirs).max() > 1
    assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
