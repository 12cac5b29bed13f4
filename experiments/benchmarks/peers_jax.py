"""jax-linear-attention's recurrences, for kernels.py --peers."""


def jla_rwkv6(r, k, v, w, u):
    from jla.ops import rwkv6

    return rwkv6.chunked(r, k, v, w, u, scale=1.0)[0]


def jla_gla(r, k, v, w, u):
    from jla.ops import linear_attention

    return linear_attention("gla", r, k, v, g=w, scale=1.0)[0]


def jla_mamba2(x, dt, A, B, C, D):
    from jla.layers.ssm import mamba2_ssd

    return mamba2_ssd(x, dt, A, B, C, d=D)[0]


def jla_mamba2_without_skip(x, dt, A, B, C, D):
    from jla.layers.ssm import mamba2_ssd

    return mamba2_ssd(x, dt, A, B, C)[0]


# jax-linear-attention has no RWKV-6 kernel; GLA is the nearest that has one.
JAX_PEERS = {
    "wkv6": {"jla rwkv6, no kernel": (jla_rwkv6, True), "jla gla, no bonus": (jla_gla, False)},
    "ssd": {
        "jla mamba2_ssd": (jla_mamba2, True),
        "jla mamba2_ssd, no D": (jla_mamba2_without_skip, False),
    },
}
