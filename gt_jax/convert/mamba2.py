"""Mamba-2 as mamba_ssm, Hugging Face's transformers and flash-linear-attention (fla) store it.

fla has transformers' names for tensors and most settings, and names of its own for some.
"""

from math import inf

from gt_jax.convert import settings
from gt_jax.convert.layout import Change, Layout, Rule, count_blocks, shape_of, transpose
from gt_jax.convert.settings import Settings
from gt_jax.errors import InputError
from gt_jax.models.config import MAMBA_EXPAND
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
MAMBA_SSM_WANTED = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}
MAMBA_SSM_MIXER_WANTED = {
    "layer": "Mamba2",
    "d_conv": CONV_WIDTH,
    "expand": MAMBA_EXPAND,
    "d_ssm": None,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "bias": False,
    "conv_bias": True,
    "dt_limit": [0.0, inf],
    "process_group": None,
}
# How a new mixer is drawn, and how its kernels are run.
MAMBA_SSM_MIXER_FREE = """
    conv_init A_init_range dt_min dt_max dt_init_floor chunk_size use_mem_eff_path
    sequence_parallel layer_idx device dtype
"""
# How kernels are run, the settings of attention that no layer has, and what is read below.
MAMBA_SSM_FREE = """
    residual_in_fp32 fused_add_norm attn_cfg ssm_cfg tie_embeddings vocab_size
    pad_vocab_size_multiple
"""
TRANSFORMERS_WANTED = {
    "conv_kernel": CONV_WIDTH,
    "expand": MAMBA_EXPAND,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": [0.0, inf],
}
FLA_WANTED = {
    "norm_eps": 1e-5,
    "rmsnorm": True,
    "rms_norm": True,  # of its first versions, and of transformers'
    "norm_before_gate": False,
    "D_has_hdim": False,
    "dt_limit": [0.0, inf],
}
# fla's own settings: where they stand, its defaults hold.
FLA_MARKS = {"norm_eps", "rmsnorm", "D_has_hdim", "dt_limit", "dt_min", "fuse_norm"}
# Initialisation, kernels, the loss, and the residual's dtype, always float32 here.
TRANSFORMERS_FREE = """
    n_groups residual_in_fp32 rescale_prenorm_residual chunk_size time_step_rank time_step_min
    time_step_max time_step_floor time_step_scale time_step_init_scheme tie_word_embeddings
    conv_init A_init_range dt_min dt_max dt_init_floor fuse_norm fuse_cross_entropy
    fuse_linear_cross_entropy use_l2warp
"""


def _fields(tensors, embedding, tied, groups, said):
    """The fields of ModelConfig.

    Args:
        tensors: by name.
        embedding: its name.
        tied: whether the head is the embedding.
        groups: how many config.json says share B and C; no tensor's shape tells.
        said: how it says so, for messages.
    """
    vocab_size, dim = shape_of(tensors, embedding, 2)
    channels, _, _ = shape_of(tensors, "backbone.layers.0.mixer.conv1d.weight", 3)
    (heads,) = shape_of(tensors, "backbone.layers.0.mixer.A_log", 1)
    inner = MAMBA_EXPAND * dim
    if inner % heads:
        raise InputError(f"the {inner} channels of the mixer are no multiple of its {heads} heads")
    if type(groups) is not int or groups < 1 or heads % groups or (channels - inner) % (2 * groups):
        raise InputError(
            f"config.json: {said}={settings.shown(groups)} must divide the {heads} heads and the "
            f"{(channels - inner) // 2} channels of B that its tensors have"
        )
    return {
        "architecture": "mamba2",
        "vocab_size": vocab_size,
        "dim": dim,
        "layers": count_blocks(tensors, "backbone.layers.*."),
        "state_size": (channels - inner) // (2 * groups),  # B and C beside the values
        "mamba_head_dim": inner // heads,
        "mamba_groups": groups,
        "tie_embeddings": bool(tied),
    }


def _mamba_ssm_fields(tensors, config):
    settings.check(config, MAMBA_SSM_SETTINGS)
    mixer = config.get("ssm_cfg", {})
    mixer = {} if mixer is None else mixer
    settings.check_values(mixer, MAMBA_SSM_MIXER_WANTED, {"layer": "Mamba1"}, "ssm_cfg.")
    sizes = {"d_state": "state_size", "headdim": "mamba_head_dim", "ngroups": "mamba_groups"}
    known = {*MAMBA_SSM_MIXER_WANTED, *MAMBA_SSM_MIXER_FREE.split(), *sizes}
    settings.check_known(mixer, known, "ssm_cfg.")
    tied = settings.flag(config, "tie_embeddings", True)
    groups = mixer.get("ngroups", 1)
    fields = _fields(tensors, "backbone.embedding.weight", tied, groups, "ssm_cfg.ngroups")
    _check_vocabulary(config, fields["vocab_size"])
    for name, field in sizes.items():
        if mixer.get(name) not in (None, fields[field]):
            raise InputError(
                f"config.json: ssm_cfg.{name}={settings.shown(mixer[name])}, but its tensors have "
                f"{fields[field]}"
            )
    return fields


def _check_vocabulary(config, rows):
    """mamba_ssm rounds the vocabulary up to a multiple, which is what the tensors have."""
    said, multiple = config.get("vocab_size"), config.get("pad_vocab_size_multiple", 8)
    for name, value in (("vocab_size", said), ("pad_vocab_size_multiple", multiple)):
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"config.json: {name}={settings.shown(value)} must be a whole number")
    if said is not None and rows != -(-said // (multiple or 1)) * (multiple or 1):
        raise InputError(
            f"config.json: vocab_size={said} in multiples of {multiple} is not the {rows} of its "
            "tensors"
        )


def _transformers_fields(tensors, config):
    of_fla = FLA_MARKS & set(config) and "layer_norm_epsilon" not in config
    wanted = TRANSFORMERS_SETTINGS.wanted
    if not of_fla:  # Codestral's configuration says true, but no version of transformers reads it
        wanted = {name: value for name, value in wanted.items() if name != "norm_before_gate"}
    settings.check(config, TRANSFORMERS_SETTINGS._replace(wanted=wanted))
    tied = settings.flag(config, "tie_word_embeddings", False)
    groups = config.get("n_groups", 1 if of_fla else 8)
    return _fields(tensors, "backbone.embeddings.weight", tied, groups, "n_groups")


def _mamba_ssm_sizes(c):
    return {"d_model": c.dim, "n_layer": c.layers}


def _transformers_sizes(c):
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.layers,
        "num_heads": c.mamba_heads,
        "head_dim": c.mamba_head_dim,
        "state_size": c.state_size,
        "intermediate_size": c.mamba_dim,
    }


def _mamba_ssm_config(c):
    return {
        "d_model": c.dim,
        "n_layer": c.layers,
        "vocab_size": c.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": c.state_size,
            "headdim": c.mamba_head_dim,
            "ngroups": c.mamba_groups,
        },
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": c.tie_embeddings,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        **MAMBA_SSM_WANTED,
    }


def _transformers_config(c):
    limitless = {name: v for name, v in TRANSFORMERS_WANTED.items() if name != "time_step_limit"}
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.layers,
        "num_heads": c.mamba_heads,
        "head_dim": c.mamba_head_dim,
        "n_groups": c.mamba_groups,
        "state_size": c.state_size,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": "float32",
        **limitless,  # JSON has no infinity, and it is the default
    }


MAMBA_SSM_SETTINGS = Settings(
    model_types=("mamba2", "mamba_ssm"),
    architectures=("MambaLMHeadModel", "Mamba2ForCausalLM"),
    wanted=MAMBA_SSM_WANTED,
    defaults={},
    sizes=_mamba_ssm_sizes,
    layers="n_layer",
    free=frozenset(MAMBA_SSM_FREE.split()),
)
TRANSFORMERS_SETTINGS = Settings(
    model_types=("mamba2",),
    architectures=("Mamba2ForCausalLM",),
    wanted=TRANSFORMERS_WANTED | FLA_WANTED,
    defaults={},
    sizes=_transformers_sizes,
    layers="num_hidden_layers",
    free=frozenset(TRANSFORMERS_FREE.split()),
)

LAYOUTS = {
    "mamba-ssm": Layout(
        about="the mamba_ssm package's Mamba-2, a folder",
        architecture="mamba2",
        mark="backbone.embedding.weight",
        rules=MAMBA_SSM,
        fields=_mamba_ssm_fields,
        settings=MAMBA_SSM_SETTINGS,
        config=_mamba_ssm_config,
        weights="pytorch_model.bin",
    ),
    "mamba2-hf": Layout(
        about="Hugging Face's or fla's Mamba2ForCausalLM, a folder",
        architecture="mamba2",
        mark="backbone.embeddings.weight",
        rules=TRANSFORMERS,
        fields=_transformers_fields,
        settings=TRANSFORMERS_SETTINGS,
        config=_transformers_config,
        weights="model.safetensors",
    ),
}
