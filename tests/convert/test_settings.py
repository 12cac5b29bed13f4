"""config.json of other libraries: each setting is honoured, refused with its value, or unknown."""

import json

import numpy as np
import pytest

from gt_jax import convert
from gt_jax.convert import LAYOUTS, files, import_model, settings
from gt_jax.errors import InputError
from tests.convert import small

PAIRS = {"rwkv-hf": "rwkv6", "fla": "rwkv6", "mamba-ssm": "mamba2", "mamba2-hf": "mamba2"}
# flash-linear-attention's Mamba2Config with its defaults, but for the sizes.
FLA_MAMBA2 = {
    "model_type": "mamba2",
    "architectures": ["Mamba2ForCausalLM"],
    "vocab_size": small.VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "head_dim": 64,
    "expand": 2,
    "conv_kernel": 4,
    "norm_eps": 1e-5,
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "dt_limit": [0.0, float("inf")],
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init_floor": 1e-4,
    "A_init_range": [1, 16],
    "conv_init": None,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "chunk_size": 256,
    "residual_in_fp32": True,
    "rescale_prenorm_residual": True,
    "initializer_range": 0.02,
    "fuse_norm": True,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "use_l2warp": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "transformers_version": "4.53.0",
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def recognise(tmp_path_factory):
    """(layout, changes of config.json, removed tensors) -> what import makes of the folder."""
    root, stored = tmp_path_factory.mktemp("stored"), {}
    for layout, name in PAIRS.items():
        arrays, config = small.arrays_of(name, layout), small.config_of(name, layout)
        files.write_folder(root / layout, "pytorch_model.bin", arrays, config)
        stored[layout] = files.read(root / layout)
    fla = stored["mamba2-hf"]._replace(config=FLA_MAMBA2)
    stored["mamba2-fla"] = fla

    def recognise(layout, changes=(), lost=()):
        found = stored[layout]
        config = {k: v for k, v in (found.config | dict(changes)).items() if v is not ...}
        tensors = {n: t for n, t in found.tensors.items() if not any(part in n for part in lost)}
        return convert._recognise(found._replace(config=config, tensors=tensors))

    return recognise


@pytest.mark.parametrize("layout", [*PAIRS, "mamba2-fla"])
def test_config_as_published_is_taken(recognise, layout):
    name, config, unset = recognise(layout)
    assert name == ("mamba2-hf" if layout == "mamba2-fla" else layout)
    assert config == small.MODELS[PAIRS[name]] and not unset


REFUSED = [
    *(("rwkv-hf", name, value) for name, value in (
        ("layer_norm_epsilon", 1e-6), ("head_size_divisor", 4), ("tie_word_embeddings", True))),
    *(("fla", name, value) for name, value in (
        ("expand_k", 0.5), ("expand_v", 2.0), ("hidden_act", "relu"), ("norm_first", False),
        ("norm_bias", False), ("norm_eps", 1e-6), ("attn", {"layers": [1]}),
        ("tie_word_embeddings", True), ("use_glu", True), ("use_short_conv", True))),
    *(("mamba-ssm", name, value) for name, value in (
        ("rms_norm", False), ("d_intermediate", 64), ("attn_layer_idx", [1]))),
    *(("mamba2-hf", name, value) for name, value in (
        ("conv_kernel", 3), ("expand", 1), ("hidden_act", "gelu"), ("layer_norm_epsilon", 1e-6),
        ("use_bias", True), ("use_conv_bias", False), ("time_step_limit", [0.001, 0.1]),
        ("rms_norm", False), ("quantization_config", {"bits": 4}), ("is_encoder_decoder", True))),
    *(("mamba2-fla", name, value) for name, value in (
        ("norm_before_gate", True), ("norm_eps", 1e-6), ("dt_limit", [0.001, 0.1]),
        ("rmsnorm", False), ("D_has_hdim", True))),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "name", "value"), REFUSED)
def test_other_mathematics_is_refused_with_its_value(recognise, layout, name, value):
    with pytest.raises(InputError) as refused:
        recognise(layout, {name: value})
    assert str(refused.value).startswith(f"config.json: {name}={value!r} must be ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "Mamba1"}, "ssm_cfg.layer='Mamba1' must be 'Mamba2'"),
        ({"layer": "Mamba3"}, "ssm_cfg.layer='Mamba3' must be 'Mamba2'"),
        ({"d_conv": 3}, "ssm_cfg.d_conv=3 must be 4"),
        ({"headdim": 128}, "ssm_cfg.headdim=128, but its tensors have 64"),
        ({"ngroups": 3}, "ssm_cfg.ngroups=3 must divide the 2 heads and the 16 channels of B"),
        ({"ngroups": 2}, "ssm_cfg.d_state=16, but its tensors have 8"),
        ({"ngroups": "1"}, "ssm_cfg.ngroups='1' must divide the 2 heads"),
        ({"norm_before_gate": True}, "ssm_cfg.norm_before_gate=True must be False"),
        ({"dt_limit": [0, 1]}, r"ssm_cfg.dt_limit=\[0, 1\] must be"),
        ({"d_ssm": 64}, "ssm_cfg.d_ssm=64 must be None"),
        ({"d_state": 64}, "ssm_cfg.d_state=64, but its tensors have 16"),
        ({"use_magic": 1}, "ssm_cfg.use_magic=1 is unknown"),
    ],
)
def test_settings_of_mamba_ssm_s_mixer_are_checked(recognise, changes, message):
    mixer = {"layer": "Mamba2", "d_state": 16} | changes
    with pytest.raises(InputError, match=message):
        recognise("mamba-ssm", {"ssm_cfg": mixer})


SIZES = [
    (layout, name)
    for layout in PAIRS
    for name in LAYOUTS[layout].settings.sizes(small.MODELS[PAIRS[layout]])
]


@pytest.mark.parametrize(("layout", "name"), SIZES)
def test_every_size_is_compared_with_the_tensors(recognise, layout, name):
    for value in (1, 10**6, 64.5, "64", [64]):
        with pytest.raises(InputError, match=rf"{name}=.*, but its tensors have"):
            recognise(layout, {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 28}, "vocab_size=28 in multiples of 1 is not the 29 of its tensors"),
        ({"pad_vocab_size_multiple": 8}, "vocab_size=29 in multiples of 8 is not the 29"),
        ({"vocab_size": "29"}, "vocab_size='29' must be a whole number"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple=0 must be a whole number"),
    ],
)
def test_vocabulary_of_mamba_ssm_is_rounded_up(recognise, changes, message):
    recognise("mamba-ssm", {"vocab_size": 27, "pad_vocab_size_multiple": 29})
    with pytest.raises(InputError, match=message):
        recognise("mamba-ssm", changes)


@pytest.mark.parametrize("layout", PAIRS)
def test_checkpoint_that_lost_its_last_block_is_refused(recognise, layout):
    lost = {"rwkv-hf": "blocks.1.", "fla": "layers.1."}.get(layout, "layers.1.")
    layers = LAYOUTS[layout].settings.layers
    with pytest.raises(InputError, match=f"{layers}=2, but its tensors have 1"):
        recognise(layout, lost=[lost])
    with pytest.raises(InputError, match=f"{layers} is missing"):
        recognise(layout, {layers: ...}, lost=[lost])


@pytest.mark.parametrize("layout", PAIRS)
def test_unknown_settings_are_named(recognise, layout):
    with pytest.raises(InputError, match=r"config.json: use_magic=3 is unknown and may change"):
        recognise(layout, {"use_magic": 3})
    with pytest.raises(InputError, match="did you mean 'vocab_size'"):
        recognise(layout, {"vocabsize": 29})
    assert recognise(layout, {"use_magic": None})[2] == ["use_magic"]


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("kind", ["llama", "mamba", "rwkv5", "rwkv7", ["x"], {}])
def test_model_type_decides(recognise, layout, kind):
    with pytest.raises(
        InputError, match=r"config.json: model_type=.* is neither RWKV-6 nor Mamba-2"
    ):
        recognise(layout, {"model_type": kind})
    other = {"rwkv6": "mamba2", "mamba2": "rwkv6"}[PAIRS[layout]]
    with pytest.raises(InputError, match=f"model_type='{other}' must be"):
        recognise(layout, {"model_type": other})
    for names in (["LlamaForCausalLM"], "x", [["x"]], {}):
        with pytest.raises(InputError, match=r"architectures=.* must be a list of"):
            recognise(layout, {"architectures": names})


def test_silence_means_the_library_s_default(recognise):
    with pytest.raises(InputError, match="n_groups=8 must divide the 2 heads"):  # transformers
        recognise("mamba2-hf", {"n_groups": ...})
    assert recognise("mamba2-fla", {"n_groups": ...})[1].state_size == 16  # fla has one group
    with pytest.raises(InputError, match=r"expand_k=0\.5 must be 1\.0"):
        recognise("fla", {"expand_k": ...})


@pytest.mark.parametrize("groups", [0, 3, 8, -1, 1.0, True, None, "2", [1]])
@pytest.mark.parametrize("layout", ["mamba2-hf", "mamba2-fla"])
def test_groups_that_the_tensors_cannot_have_are_named(recognise, layout, groups):
    with pytest.raises(InputError, match=r"config.json: n_groups=.* must divide the 2 heads and"):
        recognise(layout, {"n_groups": groups})
    with pytest.raises(InputError, match=r"state_size=16, but its tensors have 8"):
        recognise(layout, {"n_groups": 2})


# Codestral's, of a file made with transformers 4.44, but for its sizes.
CODESTRAL = {
    "norm_before_gate": True,
    "time_step_init_scheme": "random",
    "time_step_scale": 1.0,
    "time_step_rank": 256,
    "rms_norm": True,
    "rescale_prenorm_residual": False,
}


def test_codestral_s_configuration_is_taken_and_what_no_library_reads_is_left(recognise):
    found = recognise("mamba2-hf", CODESTRAL | {"n_groups": 2, "state_size": 8})[1]
    assert (found.mamba_groups, found.state_size, found.mamba_head_dim) == (2, 8, 64)


def test_hidden_ratio_of_fla_counts_where_no_size_is_given(recognise):
    recognise("fla", {"hidden_ratio": 4.0})  # beside intermediate_size it is not read
    recognise("fla", {"hidden_ratio": 3.5, "intermediate_size": None})
    for ratio in (4.0, "3.5", float("nan"), 10**30):
        with pytest.raises(InputError, match=r"hidden_ratio=.* must be 3\.5"):
            recognise("fla", {"hidden_ratio": ratio, "intermediate_size": None})


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("value", [29, -1, "0", 1.0, True, [0, 29], [[0]], {}])
def test_special_ids_outside_the_vocabulary_are_named(recognise, layout, value):
    with pytest.raises(
        InputError, match=r"eos_token_id=.* is no id of this model: ids are 0 to 28"
    ):
        recognise(layout, {"eos_token_id": value})
    recognise(layout, {"eos_token_id": [0, 28], "pad_token_id": None})


def test_ids_of_generation_config_are_checked(tmp_path):
    folder = small.store("mamba2", "mamba-ssm", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 50277}))
    with pytest.raises(InputError, match=r"generation_config.json: pad_token_id=50277 is no id"):
        import_model(folder, tmp_path / "new")


def test_tokenizer_with_ids_beyond_the_model_is_refused(tmp_path):
    """Four tokens, one of which has an id that the embedding has no row for."""
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    path = small.store("rwkv6", "rwkv-lm", tmp_path)
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2, "<far>": 29}},
    }
    content["model"]["unk_token"] = "[UNK]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="its '<far>' is 29; give the model's own"):
        import_model(path, tmp_path / "new")


def test_a_warning_names_what_was_left_out(tmp_path):
    folder = small.store("mamba2", "mamba-ssm", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"use_magic": None}
    (folder / "config.json").write_text(json.dumps(config))
    said = import_model(folder, tmp_path / "new")
    assert said.endswith("\nwarning: config.json: use_magic=null is unknown and was left out")


def test_every_setting_of_transformers_is_known():
    transformers = pytest.importorskip("transformers", reason="its configuration is the oracle")
    layout = LAYOUTS["mamba2-hf"].settings
    known = {*layout.wanted, *layout.free, *settings.NEUTRAL, *settings.OF_EVERY_MODEL}
    known |= set(layout.sizes(small.MODELS["mamba2"]))
    config = transformers.Mamba2Config()
    theirs = set(config.to_dict()) | set(json.loads(config.to_json_string(use_diff=False)))
    assert theirs <= known, theirs - known


def test_settings_left_free_change_no_logit_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="its model is the oracle")
    torch = pytest.importorskip("torch", reason="runs transformers")
    from tests.convert import test_other_libraries as others

    model = others.transformers_model(tied=False)
    free = {
        "chunk_size": 8,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "time_step_min": 0.5,
        "time_step_max": 0.6,
        "time_step_floor": 0.4,
        "time_step_rank": 3,
        "initializer_range": 3.0,
        "use_cache": False,
    }
    config = transformers.Mamba2Config(**model.config.to_dict() | free)
    other = transformers.Mamba2ForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    with torch.no_grad():
        logits = other(torch.tensor(others.TOKENS[None, : others.PROMPT])).logits[0].numpy()
    ours = others.our_logits(tmp_path / "ours")[: others.PROMPT]
    error = np.abs(ours - logits).max() / np.abs(logits).max()
    assert error < others.TOLERANCE
