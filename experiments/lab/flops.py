"""Model FLOPs: what the definition of a model asks for, whatever the program does to get there.

6 per token and parameter, each of which is multiplied and added once forward and twice backward,
and likewise 12 per element of a recurrence's state, which is written and read (of attention, per
key and value).
"""

from gt_jax.models import count_parameters


def flops_per_token(config, length):
    """FLOPs of training on one token in rows of `length` tokens, a whole number.

    Args:
        config: a ModelConfig.
        length: tokens in a row; only attention's count depends on it.
    """
    parts = count_parameters(config)
    multiplied = parts["total"] - parts.get("positions", 0)
    if not config.tie_embeddings:
        multiplied -= parts["embedding"]  # only looked up
    states = {
        "rwkv": config.dim * config.head_dim,
        "mamba": config.mamba_dim * config.state_size,
        "attention": config.dim * length,
    }
    mixers = config.branches.split("+") if config.architecture == "hybrid" else parts
    state = config.layers * sum(states.get(mixer, 0) for mixer in mixers)
    return 6 * multiplied + 12 * state
