"""The language model around every kind of block: embedding, blocks, norm, output head."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Initializer
from jax.core import Tracer
from jax.nn import initializers

from gt_jax.errors import InputError
from gt_jax.kernels.elementwise import residual_norm
from gt_jax.models import blocks, gpt2, hybrid, legacy, mamba2, rwkv6, stream
from gt_jax.models.config import ModelConfig
from gt_jax.models.cross_entropy import head_cross_entropy
from gt_jax.models.fsdp import gathering
from gt_jax.models.fusion import FUSIONS, check_gate
from gt_jax.models.layers import (
    ROUNDED,
    embedding_init,
    kernel_init,
    layer_norm,
    normal,
    rms_norm,
    symmetric_uniform,
)
from gt_jax.models.lookup import lookup
from gt_jax.models.roles import ROLES, roles
from gt_jax.settings import check_choice

# A model's parameters as `model.init` nests them: names -> arrays [...] float32.
Params = Mapping[str, Any]

# What the forward pass stores of a block, by ModelConfig.remat; "none" stores everything.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("recurrence", ROUNDED, *residual_norm.KEPT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Output(NamedTuple):
    """logits [B, T, vocab] float32, and the state after the last token: one entry per block.

    With model.segment_token a RoleState follows them.
    """

    logits: jax.Array
    state: Any


class Loss(NamedTuple):
    """nats [] float32, the summed cross-entropy, and the state after the last token."""

    nats: jax.Array
    state: Any


class LanguageModel(nn.Module):
    """Tokens in, logits and state out; the same call trains, prefills and steps."""

    config: ModelConfig

    def __call__(
        self,
        tokens: jax.Array,
        state: Any = None,
        *,
        segment_ids: jax.Array | None = None,
        rwkv_drop: float | jax.Array | None = None,
    ) -> Output:
        """Applies the model.

        Args:
            tokens: [B, T] int.
            state: `Output.state` of the tokens before, or `first_state` of gt_jax.models.carry,
                which is what None stands for.
                With T = 1 and a state every recurrence takes its single-token form.
            segment_ids: [B, T] int; a token whose id differs from the token before starts a
                document that sees nothing of what came before. `state` belongs to the first one.
            rwkv_drop: probability in [0, 1] of dropping the RWKV branch of a hybrid block: one draw
                per block for the whole batch; a kept branch is divided by 1 - rwkv_drop. Draws from
                `rngs={"dropout": key}`. None draws nothing.

        Returns:
            Output. Branches, gates and fused updates come with `mutable=["activations"]`.

        Raises:
            InputError: more positions than a GPT has (inside jit: NaN logits from there on), or
                rwkv_drop for a model that is no hybrid of RWKV and another.
        """
        x, head, state = self._read(tokens, state, segment_ids, rwkv_drop)
        logits = jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        return Output(logits.reshape(*tokens.shape, -1), state)

    def loss(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        state: Any = None,
        *,
        segment_ids: jax.Array | None = None,
        rwkv_drop: float | jax.Array | None = None,
    ) -> Loss:
        """The model's loss on a text, without [B, T, vocab] logits in memory.

        Args:
            tokens, state, segment_ids, rwkv_drop: as for a call.
            targets: [B, T] int; those below 0 do not count.

        Returns:
            Loss; what else comes and what is raised is as for a call.
        """
        x, head, state = self._read(tokens, state, segment_ids, rwkv_drop)
        kernels = self.config.impl not in ("chunked", "reference")
        return Loss(head_cross_entropy(x, head, targets.ravel(), kernels), state)

    @nn.compact
    def _read(self, tokens, state, segment_ids, rwkv_drop):
        """Normalised hidden vectors [B T, D], the head [D, vocab] float32, and the state after."""
        c = self.config
        chex.assert_rank(tokens, 2)
        if rwkv_drop is not None and (c.architecture, c.branches) != ("hybrid", "rwkv+mamba"):
            found = c.architecture if c.architecture != "hybrid" else c.branches
            raise InputError(
                "train.rwkv_dropout_start and train.rwkv_dropout_end need "
                f"model.architecture='hybrid' with RWKV beside Mamba, not {found!r}"
            )
        block, norm, embed_init, head_init = _block_and_inits(c)

        # The residual stream is a long sum: float32 whatever the blocks compute in.
        embedding = nn.Embed(c.vocab_size, c.dim, embedding_init=embed_init, name="embedding")
        x = lookup(embedding.embedding, tokens)  # [B, T, D] float32
        if c.position_limit is not None:
            x = x + self._positions(tokens.shape, state, segment_ids)
        role_state = ()
        if c.segment_token is not None:
            before = None if state is None else state[c.layers]
            role, after = roles(tokens, c.segment_token, before, segment_ids)  # [B, T]
            shape = (len(ROLES), c.dim)
            table = self.param("segment_embedding", initializers.zeros, shape)
            x = x + lookup(jnp.pad(table, ((1, 0), (0, 0))), role)
            role_state = (after,)
        # To whom blocks are shown, streams are arrays.
        if block is hybrid.Block and c.feed_forward and not blocks.are_shown(self):
            x = stream.begin(c, x)
        alike = int(block is rwkv6.Block)  # whose first one also normalises the embedding
        block = gathering(block, c)
        if c.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[c.remat])
        random = rwkv_drop is not None
        apply_block = blocks.caller(self, block, c, alike=alike, random=random)
        states = []
        # Unrolled: a scan over blocks compiles one of them, but copies what the backward pass needs
        # of each into and out of arrays of all; a step of gf_mh takes 1.8 times as long (H200).
        for layer in range(c.layers):
            before = None if state is None else state[layer]
            x, after = apply_block(layer, x, before, segment_ids, rwkv_drop)
            states.append(after)
        x = norm(c, "final_norm")(stream.summed(x))
        x = x.reshape(-1, c.dim)  # one axis of tokens, as in `project`
        if c.tie_embeddings:
            head = embedding.embedding.T
        else:
            head = self.param("head", head_init, (c.dim, c.vocab_size))
        return x, head, (*states, *role_state)

    def _positions(self, shape, state, segment_ids):
        """Learned position embeddings [B, T, D], NaN where there are none."""
        c = self.config
        table = self.param("positions", embedding_init(c, normal), (c.max_positions, c.dim))
        cache = None if state is None else state[0]
        if segment_ids is None:
            used = 0 if cache is None else cache.length
            known = not isinstance(used, Tracer)
            needed = shape[1] + (int(np.max(used)) if known else 0)
            if needed > c.max_positions:
                raise InputError(
                    f"model.max_positions={c.max_positions} must be at least the {needed} tokens "
                    "to attend over: shorten the text or train with more positions"
                )
        place = gpt2.positions(shape, cache, segment_ids)
        return lookup(table, place)

    def init_state(self, batch_size: int) -> Any:
        """Zeros with the structure of `Output.state`: the state before any token.

        With model.learned_states that is `first_state` of gt_jax.models.carry.
        """
        key, tokens = jax.random.key(0), jnp.zeros((batch_size, 1), jnp.int32)
        one_block = self.clone(config=dataclasses.replace(self.config, layers=1))
        output, _ = jax.eval_shape(one_block.init_with_output, key, tokens)
        of_block, *of_roles = output.state
        state = (*[of_block] * self.config.layers, *of_roles)  # blocks have states of one shape
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


def _block_and_inits(config) -> tuple[Any, Any, Initializer, Initializer]:
    """The block, final norm, embedding initialiser and head initialiser of an architecture."""
    if config.architecture == "rwkv6" and config.branch == "official":
        gain = 0.5 * max(config.vocab_size / config.dim, 1) ** 0.5
        embed = embedding_init(config, symmetric_uniform(1e-4))
        return rwkv6.Block, layer_norm, embed, kernel_init(config, initializers.orthogonal(gain))
    block, norm = {
        "hybrid": (hybrid.Block, rms_norm),
        "rwkv6": (legacy.Block, rms_norm),
        "mamba2": (mamba2.Block, rms_norm),
        "gpt2": (gpt2.Block, layer_norm),
        "gpt1": (gpt2.Block, rms_norm),
    }[config.architecture]
    official = None if config.position_limit is None else normal
    embed = embedding_init(config, official)
    return block, norm, embed, embed


def make_model(config: ModelConfig) -> LanguageModel:
    """The Flax module of a configuration.

    Raises:
        InputError: model.fusion is not in FUSIONS, or has no gate that model.gate_init could set.
    """
    if config.architecture == "hybrid":
        check_choice("model.fusion", config.fusion, tuple(FUSIONS))
        check_gate(config)
    return LanguageModel(config)


def confined_to_device(config: ModelConfig) -> str | None:
    """Why devices cannot share the tokens of a row of this model, None where they can.

    The official mixers read what the device before holds (see `gt_jax.kernels.context_parallel`).
    """
    if config.position_limit is not None:
        return "attention reads every token before"
    if config.branch == "legacy" and config.legacy_wkv != "a":
        return f"model.legacy_wkv={config.legacy_wkv} sums over the tokens of one device"
    off_in = {"segment_token": None, "rwkv_carry": 0.0, "mamba_reset": None}
    for name, off in (off_in | {"learned_states": False}).items():
        value = getattr(config, name)
        if value != off:
            return f"model.{name}={value} follows the tokens of one device"
    if config.architecture != "hybrid":
        return None
    key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    output, _ = jax.eval_shape(make_model(config).init_with_output, key, tokens)
    if any(block.fusion is not None for block in output.state):
        return f"model.fusion={config.fusion} keeps a state over the tokens of one device"
    return None


PARTS = (
    "embedding",
    "segment_embedding",
    "positions",
    "head",
    "rwkv",
    "mamba",
    "attention",
    "fusion",
    "ffn",
)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part; "norms" counts what no other part holds, "total" all of them.

    Nothing is allocated.
    """
    # Blocks have parameters of one shape from the second on: that one stands for all others.
    model = make_model(dataclasses.replace(config, layers=min(config.layers, 2)))
    init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.eval_shape(init)["params"]
    counts = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [entry.key.removesuffix("_2") for entry in path]
        part = next((name for name in names if name in PARTS), "norms")
        alike = config.layers - 1 if path[0].key == "blocks_1" else 1
        counts[part] = counts.get(part, 0) + alike * leaf.size
    return counts | {"total": sum(counts.values())}
