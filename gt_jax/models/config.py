"""Every architecture choice of a model, checked when it is made."""

import dataclasses
import math

from gt_jax.errors import InputError
from gt_jax.settings import ABOVE_ZERO, NOT_NEGATIVE, POSITIVE, SHARE, Range, check, setting

MAMBA_EXPAND = 2
# Building or compiling larger ones takes minutes, however small all else is; real ones have some
# hundred layers and 256 state channels.
MOST = {"layers": 1024, "state_size": 1024}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's architecture, initialisation and computation type. Parameters are float32.

    Each field says what it is; `python -m gt_jax.train --help` prints the same lines. Wherever
    roles are named, the first of a hybrid's branches is "rwkv" and the second "mamba". Norms,
    decays, softmaxes, gates, recurrent states and the residual stream stay float32 whatever `dtype`
    says.

    Raises:
        InputError: a value is impossible; the message names the field and the fix.
    """

    vocab_size: int = setting(dataclasses.MISSING, "number of token ids", POSITIVE)
    architecture: str = setting(
        "hybrid",
        "two branches in every block, or one mixer; gpt2 has LayerNorm, gpt1 RMSNorm",
        choices=("hybrid", "rwkv6", "mamba2", "gpt2", "gpt1"),
    )
    dim: int = setting(128, "width of the residual stream", POSITIVE)
    layers: int = setting(8, "number of blocks", POSITIVE)
    heads: int = setting(
        4, "RWKV or attention heads, must divide dim; Mamba-2 has 2 dim / mamba_head_dim", POSITIVE
    )
    state_size: int = setting(64, "Mamba-2 state channels per head", POSITIVE)
    mamba_head_dim: int = setting(64, "channels of a Mamba-2 head, must divide 2 dim", POSITIVE)
    mamba_groups: int = setting(
        1, "groups of Mamba-2 heads; a group shares B, C and the last norm", POSITIVE
    )
    mix_rank: int | None = setting(
        None, "rank of RWKV-6's five blends; None: 32, and 64 from dim 4096", POSITIVE
    )
    decay_rank: int | None = setting(
        None, "rank of RWKV-6's decay; None: 64, and 128 from dim 4096", POSITIVE
    )
    fusion: str = setting("gf", "how a hybrid joins its branches, a key of gt_jax.models.FUSIONS")
    gate_init: float | None = setting(
        None,
        "weight of the RWKV branch at the start, for fusions that have one; None: the fusion's own."
        " The branch itself starts at zero: at step 0 the update is Mamba-2's alone, unless"
        " branch_start says otherwise",
    )
    residual: str = setting(
        "none",
        "the branches of a hybrid that add their input to their output before they are fused",
        choices=("none", "mamba", "both"),
    )
    post_norm: bool = setting(
        False, "a hybrid block normalises the fused update before it joins the residual stream"
    )
    branch_epsilon: float | None = setting(
        None,
        "added to the mean square where a fusion normalises a branch, or post_norm the update: they"
        " amplify by at most 1 / sqrt(branch_epsilon); None: 1e-6 in hy, else 1e-2",
        ABOVE_ZERO,
    )
    branches: str = setting(
        "rwkv+mamba",
        "a hybrid's two branches, in this order, or two alike",
        choices=("rwkv+mamba", "rwkv+rwkv", "mamba+mamba"),
    )
    branch: str = setting(
        "official",
        "RWKV mixer: official RWKV-6, or the branch of the GroundThink repository",
        choices=("official", "legacy"),
    )
    legacy_wkv: str = setting(
        "a",
        "recurrence of the legacy branch, see gt_jax.models.legacy",
        choices=("a", "b1", "b2", "c"),
    )
    init: str = setting(
        "official",
        "official: each part as its source has it, embeddings of hybrids and Mamba-2 from"
        " N(0, 1/dim); normal: dense kernels and embeddings from N(0, 0.02); blinkdl: official,"
        " with embeddings from U(-1e-4, 1e-4) and zero output kernels; reference: as the"
        " GroundThink repository starts its hybrids (needs branch=legacy)",
        choices=("official", "normal", "blinkdl", "reference"),
    )
    branch_start: str = setting(
        "init",
        "output kernels of a hybrid's branches that start at zero: as init says (official: RWKV-6's"
        " alone), both, or neither, RWKV-6's then drawn as Mamba-2's",
        choices=("init", "both", "neither"),
    )
    tie_embeddings: bool = setting(True, "the output head shares the embedding")
    feed_forward: bool = setting(
        True, "blocks have a feed-forward behind their mixers; pure Mamba-2 has mamba_feed_forward"
    )
    mamba_feed_forward: bool = setting(
        False, "blocks of a pure Mamba-2 have one too, which the official model has not"
    )
    segment_token: int | None = setting(
        None,
        "first of three token ids that begin an input, a thinking and an output segment, whose"
        " tokens get a learned vector added to their embeddings (8 with tokenizer char97);"
        " None: no segments",
        NOT_NEGATIVE,
    )
    rwkv_carry: float = setting(
        0.0, "share of an RWKV-6 state that survives the start of a new document", SHARE
    )
    mamba_reset: float | None = setting(
        None,
        "topic shift above which a hybrid's Mamba state starts anew: 1 - the cosine of a fast and a"
        " slow running mean of the block's input; None: documents alone reset it",
        Range(lambda v: 0 < v < 2, "above 0 and below 2"),
    )
    learned_states: bool = setting(
        False,
        "RWKV-6 and Mamba-2 begin every document with a learned state of their recurrence, zero in"
        " a new model; what train.tune=state trains",
    )
    max_positions: int = setting(
        1024, "longest document of gpt2 and gpt1 (learned positions, key-value cache)", POSITIVE
    )
    dtype: str = setting("float32", "of products and activations", choices=("float32", "bfloat16"))
    impl: str = setting(
        "auto",
        "implementation of the recurrences; auto takes the fastest that runs here",
        choices=("auto", "reference", "chunked", "portable", "mosaic"),
    )
    remat: str = setting(
        "none",
        "what the backward pass recomputes instead of storing: none, dots (all but the results of"
        " dense layers, recurrences and norm kernels) or full blocks",
        choices=("none", "dots", "full"),
    )

    def __post_init__(self):
        check(self, "model.")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise InputError(f"model.{name}={getattr(self, name)} must be at most {most}")
        self._check_widths()
        self._check_gate()
        self._check_branch()
        self._check_segments()
        self._check_states()

    def _check_widths(self):
        mixers = self.branches if self.architecture == "hybrid" else self.architecture
        if mixers not in ("mamba2", "mamba+mamba") and self.dim % self.heads:
            raise InputError(f"model.dim={self.dim} must be a multiple of model.heads={self.heads}")
        if "mamba" not in mixers:
            return
        if self.mamba_dim % self.mamba_head_dim:
            fits = self.mamba_head_dim // math.gcd(MAMBA_EXPAND, self.mamba_head_dim)
            raise InputError(
                f"model.dim={self.dim} must be a multiple of {fits}: "
                f"Mamba-2 heads have {self.mamba_head_dim} channels"
            )
        if self.mamba_heads % self.mamba_groups:
            raise InputError(
                f"model.mamba_groups={self.mamba_groups} must divide the {self.mamba_heads} heads "
                "of Mamba-2, which are 2 model.dim / model.mamba_head_dim"
            )

    def _check_gate(self):
        gate = self.gate_init
        if gate is None:
            return
        if not 0 < gate < 1:
            raise InputError(f"model.gate_init={gate!r} must lie between 0 and 1, both excluded")

    def _check_branch(self):
        legacy = self.branch == "legacy"
        if self.init == "reference" and (self.architecture != "hybrid" or not legacy):
            raise InputError(
                "model.init='reference' starts a hybrid as the original did; it needs "
                f"model.branch='legacy' and a hybrid, not {self.branch} {self.architecture}"
            )
        if self.branch_start != "init" and legacy:
            raise InputError(
                f"model.branch_start={self.branch_start!r} needs model.branch='official': the "
                "output of the legacy branch contains its input"
            )
        if self.rwkv_carry and (legacy or self.architecture not in ("hybrid", "rwkv6")):
            raise InputError(
                f"model.rwkv_carry={self.rwkv_carry} needs official RWKV-6, not {self.branch} "
                f"{self.architecture}; leave it at 0"
            )
        if self.mamba_reset is not None and (
            self.architecture != "hybrid" or "mamba" not in self.branches
        ):
            raise InputError(
                f"model.mamba_reset={self.mamba_reset} needs a hybrid with a Mamba-2 branch; leave "
                "it unset"
            )
        whole = legacy and self.legacy_wkv != "c"
        if self.residual == "both" and whole and "rwkv" in self.branches:
            raise InputError(
                "model.residual='both' adds the input twice to model.branch='legacy', whose output "
                "contains it; set model.residual='mamba'"
            )

    def _check_segments(self):
        first = self.segment_token
        if first is not None and first + 3 > self.vocab_size:
            raise InputError(
                f"model.segment_token={first} must be the first of three ids below the tokenizer's "
                f"{self.vocab_size}"
            )

    def _check_states(self):
        if not self.learned_states:
            return
        legacy = self.branch == "legacy" and self.architecture in ("hybrid", "rwkv6")
        if legacy or self.position_limit is not None:
            raise InputError(
                f"model.learned_states=True, which train.tune=state sets, needs official RWKV-6 or "
                f"Mamba-2, not {self.branch} {self.architecture}; leave both unset"
            )
        for name, off in {"rwkv_carry": 0.0, "mamba_reset": None}.items():
            if getattr(self, name) != off:
                raise InputError(
                    f"model.{name}={getattr(self, name)} also says what a document begins with; "
                    f"leave it or model.learned_states=True unset"
                )

    @property
    def position_limit(self) -> int | None:
        """Tokens an attention model can attend over; None for recurrent models: no limit."""
        return self.max_positions if self.architecture in ("gpt2", "gpt1") else None

    @property
    def branch_names(self) -> tuple[str, str]:
        """Names of a hybrid's branches in parameter paths: the second of a kind ends in _2."""
        first, second = self.branches.split("+")
        return first, second if second != first else f"{second}_2"

    @property
    def head_dim(self) -> int:
        """Channels of an RWKV or attention head."""
        return self.dim // self.heads

    @property
    def mamba_dim(self) -> int:
        """Inner width of the Mamba-2 mixer."""
        return MAMBA_EXPAND * self.dim

    @property
    def mamba_heads(self) -> int:
        """Heads of the Mamba-2 mixer."""
        return self.mamba_dim // self.mamba_head_dim
