"""Mamba-2 as the mamba_ssm package and Hugging Face's transformers store it."""

from math import inf

from gt_jax.convert.layout import (
    Change,
    Layout,
    Rule,
    check_settings,
    count_blocks,
    shape_of,
    transpose,
)
from gt_jax.models.config import MAMBA_EXPAND, MAMBA_HEAD_DIM
from gt_jax.models.mamba2 import CONV_WIDTH

taps = Change(lambda x: x[:, None], lambda x: x[:, 0])  # [channels, 4] and their [channels, 1, 4]

MAMBA_SSM = (
    Rule("embedding/embedding", "backbone.embedding.weight"),
    Rule("head", "lm_head.weight", transpose),
    Rule("final_norm/scale", "backbone.norm_f.weight"),
    Rule("blocks_*/mixer_norm/scale", "backbone.layers.*.norm.weight"),
    Rule("blocks_*/mamba/in_proj/kernel", "backbone.layers.*.mixer.in_proj.weight", transpose),
    Rule("blocks_*/mamba/conv1d/weight", "backbone.layers.*.mixer.conv1d.weight", taps),
    Rule("blocks_*/mamba/conv1d/bias", "backbone.layers.*.mixer.conv1d.bias"),
    Rule("blocks_*/mamba/A_log", "backbone.layers.*.mixer.A_log"),
    Rule("blocks_*/mamba/D", "backbone.layers.*.mixer.D"),
    Rule("blocks_*/mamba/dt_bias", "backbone.layers.*.mixer.dt_bias"),
    Rule("blocks_*/mamba/norm/scale", "backbone.layers.*.mixer.norm.weight"),
    Rule("blocks_*/mamba/out_proj/kernel", "backbone.layers.*.mixer.out_proj.weight", transpose),
)
TRANSFORMERS = (MAMBA_SSM[0]._replace(theirs="backbone.embeddings.weight"), *MAMBA_SSM[1:])

# What has to be so for the mathematics to be ours.
MAMBA_SSM_SETTINGS = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}
MAMBA_SSM_MIXER_SETTINGS = {
    "layer": "Mamba2",
    "d_conv": CONV_WIDTH,
    "expand": MAMBA_EXPAND,
    "headdim": MAMBA_HEAD_DIM,
    "ngroups": 1,
    "d_ssm": None,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "bias": False,
    "conv_bias": True,
    "dt_limit": [0.0, inf],
}
TRANSFORMERS_SETTINGS = {
    "conv_kernel": CONV_WIDTH,
    "expand": MAMBA_EXPAND,
    "head_dim": MAMBA_HEAD_DIM,
    "n_groups": 1,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": [0.0, inf],
}


def _fields(tensors, embedding, tied):
    vocab_size, dim = shape_of(tensors, embedding, 2)
    channels, _, _ = shape_of(tensors, "backbone.layers.0.mixer.conv1d.weight", 3)
    return {
        "architecture": "mamba2",
        "vocab_size": vocab_size,
        "dim": dim,
        "layers": count_blocks(tensors, "backbone.layers.*."),
        "state_size": (channels - MAMBA_EXPAND * dim) // 2,  # B and C beside the values
        "tie_embeddings": bool(tied),
    }


def _mamba_ssm_fields(tensors, config):
    check_settings(config, MAMBA_SSM_SETTINGS)
    check_settings(
        config.get("ssm_cfg", {}), MAMBA_SSM_MIXER_SETTINGS, {"layer": "Mamba1"}, "ssm_cfg."
    )
    return _fields(tensors, "backbone.embedding.weight", config.get("tie_embeddings", True))


def _transformers_fields(tensors, config):
    check_settings(config, TRANSFORMERS_SETTINGS, {"n_groups": 8})
    tied = config.get("tie_word_embeddings", False)
    return _fields(tensors, "backbone.embeddings.weight", tied)


def _mamba_ssm_config(c):
    return {
        "d_model": c.dim,
        "n_layer": c.layers,
        "vocab_size": c.vocab_size,
        "ssm_cfg": {"layer": "Mamba2", "d_state": c.state_size},
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": c.tie_embeddings,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        **MAMBA_SSM_SETTINGS,
    }


def _transformers_config(c):
    limitless = {name: v for name, v in TRANSFORMERS_SETTINGS.items() if name != "time_step_limit"}
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.layers,
        "num_heads": c.mamba_heads,
        "state_size": c.state_size,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": "float32",
        **limitless,  # JSON has no infinity, and it is the default
    }


LAYOUTS = {
    "mamba-ssm": Layout(
        about="the mamba_ssm package's Mamba-2, a folder",
        architecture="mamba2",
        mark="backbone.embedding.weight",
        rules=MAMBA_SSM,
        fields=_mamba_ssm_fields,
        config=_mamba_ssm_config,
        weights="pytorch_model.bin",
    ),
    "mamba2-hf": Layout(
        about="Hugging Face's Mamba2ForCausalLM, a folder",
        architecture="mamba2",
        mark="backbone.embeddings.weight",
        rules=TRANSFORMERS,
        fields=_transformers_fields,
        config=_transformers_config,
        weights="model.safetensors",
    ),
}
