"""The families of models that questions compare, and their sizes beside the hybrid's."""

import functools
import math

from gt_jax.models import count_parameters, make_config

HYBRID = "GF-MH"
FAMILIES = {
    HYBRID: {"model.preset": "gf-mh"},
    "RWKV-6": {"model.preset": "rwkv6", "model.tie_embeddings": True},
    "Mamba-2": {"model.preset": "mamba2", "model.state_size": 64},
    "GPT-2": {"model.preset": "gpt2"},
}
# The hybrid's block around two branches of one kind.
CONTROLS = {
    "two RWKV-6": {"model.preset": "gf-mh", "model.branches": "rwkv+rwkv"},
    "two Mamba-2": {"model.preset": "gf-mh", "model.branches": "mamba+mamba"},
}
WIDTH_STEP = 32  # what Mamba-2 can have
HEAD = 32  # channels of an RWKV or attention head
COUNTED = {"all": (), "blocks": ("embedding", "positions", "head")}  # name -> what is left out
# name -> what says so; the losses of different texts do not compare.
TEXTS = {
    "characters": {"data.tokenizer": "char"},
    "subwords": {"data.tokenizer": "sentencepiece", "data.vocab_size": 4096},
}


def match(family, target, *, vocab_size, length, counted="all"):
    """Width, depth and heads of a family, as config changes, with the parameters of a hybrid.

    Never fewer. Up to 3 % more cost nothing; beyond that, a tenth more costs as much as half or
    twice the hybrid's depth. The cheapest shape is taken.

    Args:
        family: a key of FAMILIES or CONTROLS.
        target: (dim, layers) of the hybrid.
        vocab_size, length: of the task; a GPT gets as many positions.
        counted: a key of COUNTED.
    """
    size = functools.partial(_parameters, vocab_size=vocab_size, length=length, counted=counted)
    wanted, layers = size(HYBRID, *target), target[1]

    def shape(dim):
        one, two = size(family, dim, 1), size(family, dim, 2)  # each layer adds the same
        depth = max(1 - (one - wanted) // (two - one), 1)
        excess = (one + (depth - 1) * (two - one)) / wanted - 1
        return 10 * max(excess - 0.03, 0) + abs(math.log2(depth / layers)), dim, depth

    def cheapest():
        """Of all widths. A model is traced to be counted: from the hybrid's width on, wider and
        then narrower, until the depth alone, which only falls or rises, costs more than the best.
        """
        best, middle = (math.inf,), target[0] // WIDTH_STEP * WIDTH_STEP or WIDTH_STEP
        wider = range(middle, 3 * target[0] + 1, WIDTH_STEP)
        narrower = range(middle - WIDTH_STEP, 0, -WIDTH_STEP)
        for dims, sign in ((wider, 1), (narrower, -1)):
            for dim in dims:
                best = min(best, found := shape(dim))
                if sign * math.log2(layers / found[-1]) > best[0]:
                    break
        return best

    dim, layers = target if family == HYBRID else cheapest()[1:]
    changes = (FAMILIES | CONTROLS)[family] | {"model.dim": dim, "model.layers": layers}
    if family != "Mamba-2":
        changes["model.heads"] = dim // HEAD
    if family == "GPT-2":
        changes["model.max_positions"] = length
    return changes


def _parameters(family, dim, layers, *, vocab_size, length, counted):
    fields = {
        name.removeprefix("model."): value for name, value in (FAMILIES | CONTROLS)[family].items()
    }
    if family == "GPT-2":
        fields["max_positions"] = length
    fields |= {"dim": dim, "layers": layers, "heads": dim // HEAD}
    config = make_config(fields.pop("preset"), vocab_size=vocab_size, **fields)
    return counted_parameters(config, counted)


_count = functools.cache(count_parameters)


def counted_parameters(model_config, counted):
    """Number of parameters but for those that a key of COUNTED leaves out."""
    parts = _count(model_config)
    return parts["total"] - sum(parts.get(part, 0) for part in COUNTED[counted])
