"""RWKV-6 (x060) as RWKV-LM, Hugging Face and flash-linear-attention (fla) store it."""

import numpy as np

from gt_jax.convert import settings
from gt_jax.convert.layout import Change, Layout, Rule, count_blocks, shape_of, transpose
from gt_jax.convert.settings import Settings
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig
from gt_jax.models.rwkv6 import hidden_dim, mix_rank

row = Change(lambda x: x[None, None], lambda x: x[0, 0])  # [D] and their [1, 1, D]

RWKV_LM = (
    Rule("embedding/embedding", "emb.weight"),
    Rule("head", "head.weight", transpose),
    Rule("final_norm/scale", "ln_out.weight"),
    Rule("final_norm/bias", "ln_out.bias"),
    Rule("blocks_0/embedding_norm/scale", "blocks.0.ln0.weight"),
    Rule("blocks_0/embedding_norm/bias", "blocks.0.ln0.bias"),
    Rule("blocks_*/mixer_norm/scale", "blocks.*.ln1.weight"),
    Rule("blocks_*/mixer_norm/bias", "blocks.*.ln1.bias"),
    Rule("blocks_*/ffn_norm/scale", "blocks.*.ln2.weight"),
    Rule("blocks_*/ffn_norm/bias", "blocks.*.ln2.bias"),
    Rule("blocks_*/rwkv/time_maa_x", "blocks.*.att.time_maa_x", row),
    Rule("blocks_*/rwkv/time_maa_w", "blocks.*.att.time_maa_w", row),
    Rule("blocks_*/rwkv/time_maa_k", "blocks.*.att.time_maa_k", row),
    Rule("blocks_*/rwkv/time_maa_v", "blocks.*.att.time_maa_v", row),
    Rule("blocks_*/rwkv/time_maa_r", "blocks.*.att.time_maa_r", row),
    Rule("blocks_*/rwkv/time_maa_g", "blocks.*.att.time_maa_g", row),
    Rule("blocks_*/rwkv/time_maa_w1", "blocks.*.att.time_maa_w1"),
    Rule("blocks_*/rwkv/time_maa_w2", "blocks.*.att.time_maa_w2"),
    Rule("blocks_*/rwkv/time_decay", "blocks.*.att.time_decay", row),
    Rule("blocks_*/rwkv/time_decay_w1", "blocks.*.att.time_decay_w1"),
    Rule("blocks_*/rwkv/time_decay_w2", "blocks.*.att.time_decay_w2"),
    Rule("blocks_*/rwkv/time_faaaa", "blocks.*.att.time_faaaa"),
    Rule("blocks_*/rwkv/receptance/kernel", "blocks.*.att.receptance.weight", transpose),
    Rule("blocks_*/rwkv/key/kernel", "blocks.*.att.key.weight", transpose),
    Rule("blocks_*/rwkv/value/kernel", "blocks.*.att.value.weight", transpose),
    Rule("blocks_*/rwkv/gate/kernel", "blocks.*.att.gate.weight", transpose),
    Rule("blocks_*/rwkv/output/kernel", "blocks.*.att.output.weight", transpose),
    Rule("blocks_*/rwkv/ln_x/scale", "blocks.*.att.ln_x.weight"),
    Rule("blocks_*/rwkv/ln_x/bias", "blocks.*.att.ln_x.bias"),
    Rule("blocks_*/ffn/time_maa_k", "blocks.*.ffn.time_maa_k", row),
    Rule("blocks_*/ffn/time_maa_r", "blocks.*.ffn.time_maa_r", row),
    Rule("blocks_*/ffn/key/kernel", "blocks.*.ffn.key.weight", transpose),
    Rule("blocks_*/ffn/receptance/kernel", "blocks.*.ffn.receptance.weight", transpose),
    Rule("blocks_*/ffn/value/kernel", "blocks.*.ffn.value.weight", transpose),
)


# RWKV-PEFT's learned states, as the rwkv package begins a text with them: [H, V, K].
swapped = Change(lambda x: x.swapaxes(-2, -1), lambda x: x.swapaxes(-2, -1))
STATE = Rule("blocks_*/rwkv/time_state", "blocks.*.att.time_state", swapped)


def _rwkv_lm(config: ModelConfig) -> tuple[Rule, ...]:
    return (*RWKV_LM, STATE) if config.learned_states else RWKV_LM


def _rwkv_lm_fields(tensors, config):
    read = _fields("emb.weight", "blocks.*.", MIXER, HUGGING_FACE_SETTINGS, 1)
    learned = STATE.theirs.replace("*", "0") in tensors
    return read(tensors, config) | {"learned_states": learned}


def _hugging_face(name):
    """Hugging Face's name for RWKV-LM's."""
    name = name.replace(".ln0.", ".pre_ln.").replace(".att.", ".attention.")
    name = name.replace(".ffn.", ".feed_forward.").replace("emb.", "embeddings.")
    return name if name == "head.weight" else f"rwkv.{name}"


MIXER = ("att.time_faaaa", "att.time_maa_w1", "att.time_decay_w1")  # see _fields
HUGGING_FACE = tuple(rule._replace(theirs=_hugging_face(rule.theirs)) for rule in RWKV_LM)

# fla joins what belongs to the five inputs, in an order of its own.
TO_FLA = ["wkvrg".index(name) for name in "rwkvg"]
FROM_FLA = ["rwkvg".index(name) for name in "wkvrg"]
stack = Change(lambda *inputs: np.stack(inputs), tuple)
mix_in = Change(  # [D, 5 R] and their [5 R, D]
    lambda x: x.reshape(len(x), 5, -1)[:, TO_FLA].reshape(x.shape).T,
    lambda x: x.T.reshape(x.shape[1], 5, -1)[:, FROM_FLA].reshape(x.shape[::-1]),
)
mix_out = Change(  # [5, R, D] and their [D, 5 R]
    lambda x: x[TO_FLA].reshape(-1, x.shape[-1]).T,
    lambda x: x.T.reshape(5, -1, len(x))[FROM_FLA],
)
# Its norm of the heads has eps 1e-5 where RWKV-LM has 64e-5. What it norms is linear in the values:
# with values an eighth as large all variances are 1/64 and both norms give the same.
eighth = Change(lambda x: x.T / 8, lambda x: x.T * 8)

FLA_MIXER = ("attn.bonus", "attn.x_proj.0.linear.weight", "attn.w_proj.linear.lora.0.weight")
FLA = (
    Rule("embedding/embedding", "model.embeddings.weight"),
    Rule("head", "lm_head.weight", transpose),
    Rule("final_norm/scale", "model.norm.weight"),
    Rule("final_norm/bias", "model.norm.bias"),
    Rule("blocks_0/embedding_norm/scale", "model.layers.0.pre_norm.weight"),
    Rule("blocks_0/embedding_norm/bias", "model.layers.0.pre_norm.bias"),
    Rule("blocks_*/mixer_norm/scale", "model.layers.*.attn_norm.weight"),
    Rule("blocks_*/mixer_norm/bias", "model.layers.*.attn_norm.bias"),
    Rule("blocks_*/ffn_norm/scale", "model.layers.*.ffn_norm.weight"),
    Rule("blocks_*/ffn_norm/bias", "model.layers.*.ffn_norm.bias"),
    Rule("blocks_*/rwkv/time_maa_x", "model.layers.*.attn.x_proj.0.mu"),
    Rule(
        tuple(f"blocks_*/rwkv/time_maa_{name}" for name in "rwkvg"),
        "model.layers.*.attn.x_bias",
        stack,
    ),
    Rule("blocks_*/rwkv/time_maa_w1", "model.layers.*.attn.x_proj.0.linear.weight", mix_in),
    Rule("blocks_*/rwkv/time_maa_w2", "model.layers.*.attn.x_proj.2.weight", mix_out),
    Rule("blocks_*/rwkv/time_decay", "model.layers.*.attn.w_proj.linear.lora.2.bias"),
    Rule(
        "blocks_*/rwkv/time_decay_w1",
        "model.layers.*.attn.w_proj.linear.lora.0.weight",
        transpose,
    ),
    Rule(
        "blocks_*/rwkv/time_decay_w2",
        "model.layers.*.attn.w_proj.linear.lora.2.weight",
        transpose,
    ),
    Rule("blocks_*/rwkv/time_faaaa", "model.layers.*.attn.bonus"),
    Rule("blocks_*/rwkv/receptance/kernel", "model.layers.*.attn.r_proj.linear.weight", transpose),
    Rule("blocks_*/rwkv/key/kernel", "model.layers.*.attn.k_proj.linear.weight", transpose),
    Rule("blocks_*/rwkv/value/kernel", "model.layers.*.attn.v_proj.linear.weight", eighth),
    Rule("blocks_*/rwkv/gate/kernel", "model.layers.*.attn.g_proj.linear.weight", transpose),
    Rule("blocks_*/rwkv/output/kernel", "model.layers.*.attn.o_proj.weight", transpose),
    Rule("blocks_*/rwkv/ln_x/scale", "model.layers.*.attn.g_norm.weight"),
    Rule("blocks_*/rwkv/ln_x/bias", "model.layers.*.attn.g_norm.bias"),
    Rule("blocks_*/ffn/time_maa_k", "model.layers.*.ffn.key.mu"),
    Rule("blocks_*/ffn/time_maa_r", "model.layers.*.ffn.receptance.mu"),
    Rule("blocks_*/ffn/key/kernel", "model.layers.*.ffn.key.linear.weight", transpose),
    Rule(
        "blocks_*/ffn/receptance/kernel", "model.layers.*.ffn.receptance.linear.weight", transpose
    ),
    Rule("blocks_*/ffn/value/kernel", "model.layers.*.ffn.value.weight", transpose),
)


def rank_fields(mix: int | None, decay: int | None, dim: int) -> dict[str, int | None]:
    """The ModelConfig fields of these low ranks: None where they are those of the width."""
    usual = mix_rank(dim)
    return {
        "mix_rank": None if mix == usual else mix,
        "decay_rank": None if decay == 2 * usual else decay,
    }


def ranks(config: ModelConfig) -> tuple[int, int]:
    """The ranks of a model's blends and of its decay."""
    usual = mix_rank(config.dim)
    return config.mix_rank or usual, config.decay_rank or 2 * usual


def _fields(embedding, block, mixer, wanted, ranks_axis):
    """Layout.fields of a layout.

    Args:
        embedding: its name.
        block: names of block 0 begin so, with a * for the 0.
        mixer: names in a block of the bonus and of the matrices into the low ranks of the blends
            and of the decay.
        wanted: its Settings.
        ranks_axis: of those two matrices, the axis of the ranks.
    """
    bonus, mix, decay = (block.replace("*", "0") + name for name in mixer)

    def fields(tensors, config):
        if config:
            settings.check(config, wanted)
        vocab_size, dim = shape_of(tensors, embedding, 2)
        heads, _ = shape_of(tensors, bonus, 2)
        blends = shape_of(tensors, mix, 2)[ranks_axis]
        if blends % 5:
            raise InputError(f"{mix} {list(tensors[mix].shape)} must hold five blends of one rank")
        return {
            "architecture": "rwkv6",
            "vocab_size": vocab_size,
            "dim": dim,
            "layers": count_blocks(tensors, block),
            "heads": heads,
            "tie_embeddings": False,
            **rank_fields(blends // 5, shape_of(tensors, decay, 2)[ranks_axis], dim),
        }

    return fields


def _fla_fields(tensors, config):
    read = _fields("model.embeddings.weight", "model.layers.*.", FLA_MIXER, FLA_SETTINGS, 0)
    fields = read(tensors, config)
    if config.get("intermediate_size") is None and "hidden_ratio" in config:
        ratio, dim = config["hidden_ratio"], fields["dim"]
        ratio = 3.5 if ratio is None else ratio
        fits = type(ratio) in (int, float) and 0 < ratio < 1000
        if not fits or -(-int(dim * ratio) // 32) * 32 != hidden_dim(dim):
            raise InputError(
                f"config.json: hidden_ratio={settings.shown(ratio)} must be 3.5 for the "
                f"{hidden_dim(dim)} hidden units of our channel-mix"
            )
    return fields


def _hugging_face_sizes(c):
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "attention_hidden_size": c.dim,
        "intermediate_size": hidden_dim(c.dim),
        "num_hidden_layers": c.layers,
        "head_size": c.head_dim,
        # Published configurations have the size of a head here; others might count heads.
        "num_attention_heads": (c.heads, c.head_dim),
    }


def _fla_sizes(c):
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": hidden_dim(c.dim),
        "num_hidden_layers": c.layers,
        "num_heads": c.heads,
        "proj_low_rank_dim": ranks(c)[0],
        "gate_low_rank_dim": ranks(c)[1],
    }


def _hugging_face_config(c):
    return {
        "architectures": ["Rwkv6ForCausalLM"],
        "model_type": "rwkv6",
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "attention_hidden_size": c.dim,
        "intermediate_size": hidden_dim(c.dim),
        "num_hidden_layers": c.layers,
        "head_size": c.head_dim,
        "rescale_every": 0,
        "torch_dtype": "float32",
    } | HUGGING_FACE_WANTED


def _fla_config(c):
    return {
        "architectures": ["RWKV6ForCausalLM"],
        "model_type": "rwkv6",
        "torch_dtype": "float32",
        **_fla_sizes(c),
        **FLA_WANTED,
    }


# What has to be so for the mathematics to be ours.
HUGGING_FACE_WANTED = {
    "layer_norm_epsilon": 1e-5,
    "head_size_divisor": 8,
    "tie_word_embeddings": False,
}
FLA_WANTED = {
    "expand_k": 1.0,
    "expand_v": 1.0,
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "attn": None,
    "tie_word_embeddings": False,
}
# Of fla's first versions, whose models had parts that ours have not.
FLA_ONCE_WANTED = {"use_glu": False, "use_short_conv": False, "eps": 1e-5, "rms_norm_eps": 1e-5}

# How kernels are run, what the loss is, and what is looked at elsewhere.
FLA_FREE = """
    attn_mode fuse_norm fuse_cross_entropy fuse_linear_cross_entropy use_l2warp conv_size
    share_conv_kernel hidden_ratio
"""

HUGGING_FACE_SETTINGS = Settings(
    model_types=("rwkv6",),
    architectures=("Rwkv6ForCausalLM",),
    wanted=HUGGING_FACE_WANTED,
    defaults={},
    sizes=_hugging_face_sizes,
    layers="num_hidden_layers",
    # rescale_every halves what float16 would let overflow, and doubles it at the end.
    free=frozenset(["context_length", "rescale_every", "model_version"]),
)
FLA_SETTINGS = Settings(
    model_types=("rwkv6",),
    architectures=("RWKV6ForCausalLM",),
    wanted=FLA_WANTED | FLA_ONCE_WANTED,
    defaults={"expand_k": 0.5},
    sizes=_fla_sizes,
    layers="num_hidden_layers",
    free=frozenset(FLA_FREE.split()),
)

LAYOUTS = {
    "rwkv-lm": Layout(
        about="RWKV-LM's x060, a .pth or .safetensors file",
        architecture="rwkv6",
        mark="emb.weight",
        rules=_rwkv_lm,
        fields=_rwkv_lm_fields,
        settings=HUGGING_FACE_SETTINGS,
        config=None,
        weights=None,
        states=True,
    ),
    "rwkv-hf": Layout(
        about="Hugging Face's Rwkv6ForCausalLM, a folder",
        architecture="rwkv6",
        mark="rwkv.embeddings.weight",
        rules=HUGGING_FACE,
        fields=_fields(
            "rwkv.embeddings.weight",
            "rwkv.blocks.*.",
            [name.replace("att.", "attention.") for name in MIXER],
            HUGGING_FACE_SETTINGS,
            1,
        ),
        settings=HUGGING_FACE_SETTINGS,
        config=_hugging_face_config,
        weights="model.safetensors",
    ),
    "fla": Layout(
        about="flash-linear-attention's RWKV6ForCausalLM, a folder",
        architecture="rwkv6",
        mark="model.embeddings.weight",
        rules=FLA,
        fields=_fla_fields,
        settings=FLA_SETTINGS,
        config=_fla_config,
        weights="model.safetensors",
    ),
}
