"""Named models: `make_config("gf-mh", vocab_size=97)`."""

import dataclasses
from typing import Any, NamedTuple

from gt_jax.errors import InputError, did_you_mean
from gt_jax.models.config import ModelConfig
from gt_jax.models.fusion import FUSIONS, default_share


class Preset(NamedTuple):
    """A named model: a line of description, ModelConfig fields, the usual size of vocabulary."""

    about: str
    fields: dict
    vocab_size: int = 97


PRESETS = {
    "tiny": Preset(
        "HY, a minute on a laptop", {"dim": 64, "layers": 4, "heads": 2, "fusion": "hy"}
    ),
    "hy": Preset("per-channel gains on normed branches", {"fusion": "hy"}),
    "gf": Preset("one gate per position", {"fusion": "gf"}),
    "gf-mh": Preset("GF, 30 % RWKV at the start", {"fusion": "gf", "gate_init": 0.3}),
    "gf-rh": Preset("GF, 70 % RWKV at the start", {"fusion": "gf", "gate_init": 0.7}),
    "gf-xm": Preset("GF, 3 % RWKV at the start", {"fusion": "gf", "gate_init": 0.03}),
    "gf-xr": Preset("GF, 97 % RWKV at the start", {"fusion": "gf", "gate_init": 0.97}),
    "ws": Preset("one weight per layer", {"fusion": "ws"}),
    "rf": Preset("RWKV plus projected Mamba", {"fusion": "rf"}),
    "cp": Preset("concatenate and project", {"fusion": "cp"}),
    "hgf": Preset("one gate per position and channel", {"fusion": "hgf"}),
    "hgf-mh": Preset("HGF, 30 % RWKV at the start", {"fusion": "hgf", "gate_init": 0.3}),
    "hgf-rh": Preset("HGF, 70 % RWKV at the start", {"fusion": "hgf", "gate_init": 0.7}),
    "gru": Preset("a GRU weighs the branches", {"fusion": "gru"}),
    "mingru": Preset("a minGRU weighs the branches", {"fusion": "mingru"}),
    "linrec": Preset("a running mean weighs the branches", {"fusion": "linrec"}),
    "glu": Preset("gates of the block's input weigh the branches", {"fusion": "glu"}),
    "parallel": Preset("a gate per branch and channel, then a projection", {"fusion": "parallel"}),
    "pscan": Preset("a gated memory of the weighted branches", {"fusion": "pscan"}),
    "twin-debate": Preset(
        "minGRU, Mamba with its input, update normed, no feed-forward",
        {"fusion": "mingru", "residual": "mamba", "post_norm": True, "feed_forward": False},
    ),
    "medium": Preset("GF-MH, wider", {"dim": 192, "heads": 6, "fusion": "gf", "gate_init": 0.3}),
    "gf-mh-350m": Preset(
        "GF-MH of 348 M parameters",
        {"dim": 1024, "layers": 16, "heads": 16, "state_size": 128, "fusion": "gf"}
        | {"gate_init": 0.3},
        vocab_size=16384,
    ),
    "gf-mh-1b": Preset(
        "GF-MH of 1.37 B parameters",
        {"dim": 2048, "layers": 16, "heads": 32, "state_size": 128, "fusion": "gf"}
        | {"gate_init": 0.3},
        vocab_size=32768,
    ),
    "hy-192x12": Preset(
        "HY, wider and deeper", {"dim": 192, "layers": 12, "heads": 6, "fusion": "hy"}
    ),
    "gpt2": Preset("attention baseline", {"architecture": "gpt2", "dim": 192}),
    "gpt2-3m": Preset("small GPT-2", {"architecture": "gpt2", "layers": 4}),
    "gpt2-8m": Preset("large GPT-2", {"architecture": "gpt2", "dim": 256, "layers": 10}),
    "gpt1": Preset(
        "GPT with RMSNorm, 512 positions",
        {"architecture": "gpt1", "dim": 144, "max_positions": 512, "init": "blinkdl"},
        vocab_size=16000,
    ),
    "rwkv6": Preset(
        "pure RWKV-6, head not tied",
        {"architecture": "rwkv6", "dim": 144, "tie_embeddings": False},
    ),
    "mamba2": Preset(
        "pure Mamba-2, no feed-forward",
        {"architecture": "mamba2", "dim": 192, "layers": 12, "state_size": 128},
    ),
}

ALIASES = {"1m": "tiny", "5m": "hy", "small": "hy", "8m": "medium", "gf-mh-8m": "medium"}


def find_preset(name: str) -> Preset:
    """The Preset of a name or alias in any case.

    Raises:
        InputError: there is no preset of this name; the message has the nearest one.
    """
    key = str(name).lower()
    key = ALIASES.get(key, key)
    if key not in PRESETS:
        names = (*PRESETS, *ALIASES)
        raise InputError(
            f"model.preset={name!r} must be one of {', '.join(names)}{did_you_mean(name, names)}"
        )
    return PRESETS[key]


def make_config(preset: str, *, vocab_size: int, **overrides: Any) -> ModelConfig:
    """A preset's ModelConfig.

    Args:
        preset: a key of PRESETS or ALIASES, any case.
        vocab_size: number of token ids, from the tokenizer.
        **overrides: ModelConfig fields; None means "as the preset says".

    Raises:
        InputError: unknown preset or field (names the nearest), or an impossible value.
    """
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for field in overrides:
        if field not in known:
            raise InputError(f"model.{field} is not a field{did_you_mean(field, known)}")
    fields = dict(find_preset(preset).fields)
    fusion = overrides.get("fusion")
    if fusion in FUSIONS and default_share(fusion) is None:
        fields.pop("gate_init", None)  # this fusion has no gate
    # The reference tied the embeddings of its RWKV model; official RWKV-6 does not.
    if overrides.get("branch") == "legacy":
        fields.pop("tie_embeddings", None)
    fields |= {field: value for field, value in overrides.items() if value is not None}
    return ModelConfig(vocab_size=vocab_size, **fields)
