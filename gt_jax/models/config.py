"""Every architecture choice of a model, checked when it is made."""

import dataclasses
import numbers

from gt_jax.errors import InputError, did_you_mean

MAMBA_HEAD_DIM = 64
MAMBA_EXPAND = 2

CHOICES = {
    "architecture": ("hybrid", "rwkv6", "mamba2", "gpt2", "gpt1"),
    "branches": ("rwkv+mamba", "rwkv+rwkv", "mamba+mamba"),
    "branch": ("official", "legacy"),
    "legacy_wkv": ("a", "b1", "b2", "c"),
    "init": ("official", "normal", "blinkdl"),
    "dtype": ("float32", "bfloat16"),
    "impl": ("auto", "reference", "chunked", "mosaic"),
    "remat": ("none", "dots", "full"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's architecture, initialisation and computation type. Parameters are float32.

    Attributes:
        vocab_size: number of token ids.
        architecture: "hybrid" (two branches in every block), "rwkv6", "mamba2", "gpt2" (LayerNorm)
            or "gpt1" (RMSNorm).
        dim: width of the residual stream.
        layers: number of blocks.
        heads: RWKV or attention heads. Mamba heads follow from dim: 2 dim / 64.
        state_size: Mamba-2 state channels N per head.
        fusion: how a hybrid joins its branches, a key of `gt_jax.models.fusion.FUSIONS`.
        gate_init: weight of the RWKV branch at initialisation, in (0, 1), for fusions that have one
            (hy, gf, ws, hgf, gru); None takes the fusion's own.
        branches: of a hybrid: "rwkv+mamba", RWKV-6 beside Mamba-2, or two alike, "rwkv+rwkv" or
            "mamba+mamba". Wherever roles are named, the first is "rwkv" and the second "mamba".
        branch: RWKV mixer of "hybrid" and "rwkv6": "official" RWKV-6 or the "legacy" branch of the
            GroundThink reference repository. Architectures without one ignore it.
        legacy_wkv: recurrence of the legacy branch, see `gt_jax.models.legacy`.
        init: "official" gives every part the init of its source, and hybrids and Mamba-2
            embeddings from N(0, 1/dim); "normal" draws every dense kernel and embedding from
            N(0, 0.02), as the reference repository did; "blinkdl" is "official" with embeddings
            from U(-1e-4, 1e-4) and zero mixer-output and second FFN kernels.
        tie_embeddings: share the embedding with the output head.
        feed_forward: whether blocks have one behind their mixers, as RWKV-6 its channel-mix;
            without, all a model can do is its mixers' doing. Mamba-2 never has one.
        max_positions: longest document of "gpt2" and "gpt1" (learned positions, key-value cache).
        dtype: type of matmuls and activations. Norms, decays, softmaxes, gates, recurrent states
            and the residual stream stay float32.
        impl: implementation of the recurrences, passed to `gt_jax.kernels`.
        remat: what of each block the backward pass recomputes instead of storing: "none",
            "dots" (all but the results of dense layers and of the Pallas kernels) or "full".

    Raises:
        InputError: a value is impossible; the message names the field and the mend.
    """

    vocab_size: int
    architecture: str = "hybrid"
    dim: int = 128
    layers: int = 8
    heads: int = 4
    state_size: int = 64
    fusion: str = "gf"
    gate_init: float | None = None
    branches: str = "rwkv+mamba"
    branch: str = "official"
    legacy_wkv: str = "a"
    init: str = "official"
    tie_embeddings: bool = True
    feed_forward: bool = True
    max_positions: int = 1024
    dtype: str = "float32"
    impl: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        for field, choices in CHOICES.items():
            check_choice(field, getattr(self, field), choices)
        for field in ("vocab_size", "dim", "layers", "heads", "state_size", "max_positions"):
            value = getattr(self, field)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise InputError(f"model.{field}={value!r} must be a whole number of at least 1")
        for field in ("tie_embeddings", "feed_forward"):
            if not isinstance(value := getattr(self, field), bool):
                raise InputError(f"model.{field}={value!r} must be true or false")
        self._check_widths()
        self._check_gate()

    def _check_widths(self):
        mixers = self.branches if self.architecture == "hybrid" else self.architecture
        if mixers not in ("mamba2", "mamba+mamba") and self.dim % self.heads:
            raise InputError(f"model.dim={self.dim} must be a multiple of model.heads={self.heads}")
        if "mamba" in mixers and MAMBA_EXPAND * self.dim % MAMBA_HEAD_DIM:
            raise InputError(
                f"model.dim={self.dim} must be a multiple of {MAMBA_HEAD_DIM // MAMBA_EXPAND}: "
                f"Mamba-2 heads have {MAMBA_HEAD_DIM} channels"
            )

    def _check_gate(self):
        gate = self.gate_init
        if gate is None:
            return
        if not isinstance(gate, numbers.Real) or not 0 < gate < 1:
            raise InputError(f"model.gate_init={gate!r} must lie between 0 and 1, both excluded")

    @property
    def branch_names(self):
        """Names of a hybrid's branches in parameter paths: the second of a kind ends in _2."""
        first, second = self.branches.split("+")
        return first, second if second != first else f"{second}_2"

    @property
    def head_dim(self):
        """Channels of an RWKV or attention head."""
        return self.dim // self.heads

    @property
    def mamba_dim(self):
        """Inner width of the Mamba-2 mixer."""
        return MAMBA_EXPAND * self.dim

    @property
    def mamba_heads(self):
        return self.mamba_dim // MAMBA_HEAD_DIM


def check_choice(field, value, choices):
    """Raises an InputError that names the nearest choice unless value is one of them."""
    if value not in choices:
        raise InputError(
            f"model.{field}={value!r} must be one of {', '.join(choices)}"
            + did_you_mean(value, choices)
        )
