"""Larger models compute what the smaller did, and go on learning with all they have."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import gt_jax
from gt_jax.convert import __main__, params
from gt_jax.convert import expand as expand_module
from gt_jax.convert.expand import expand
from gt_jax.data.pretrained import IdTokenizer
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig
from gt_jax.models.fusion import FUSIONS

VOCAB = 17
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, 16))
KINDS = {
    "gf": {"fusion": "gf"},
    "legacy-c": {"branch": "legacy", "legacy_wkv": "c", "fusion": "ws", "tie_embeddings": False},
    "legacy": {"architecture": "rwkv6", "branch": "legacy"},
    "rwkv6": {"architecture": "rwkv6", "tie_embeddings": False, "mix_rank": 5}
    | {"learned_states": True},
    "mamba+mamba": {"branches": "mamba+mamba"},
    "mamba2": {"architecture": "mamba2", "mamba_groups": 2, "mamba_head_dim": 32}
    | {"learned_states": True},
    "gpt2": {"architecture": "gpt2", "max_positions": 16},
}


def config_of(kind, **fields):
    """One block of width 64."""
    sizes = {"vocab_size": VOCAB, "dim": 64, "layers": 1, "heads": 2, "state_size": 16}
    return ModelConfig(**(sizes | KINDS[kind] | fields))


def random_params(config, wanted=lambda path: True):
    """N(0, 0.2) for every parameter, by path."""
    rng, shapes = np.random.default_rng(0), params.shapes_of(config)
    return {
        path: np.float32(0.2 * rng.standard_normal(shape))
        for path, shape in shapes.items()
        if wanted(path)
    }


def save(folder, kind, **fields):
    config = config_of(kind, **fields)
    params.write(folder, params.Stored(config, random_params(config), IdTokenizer(VOCAB)))
    return folder


def jit(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def logits(folder):
    model, weights, _ = gt_jax.load(folder)
    return jit(model.apply)({"params": weights}, TOKENS).logits


def assert_close(found, want):
    assert want.std() > 0.01
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
def test_larger_model_computes_the_same(tmp_path, kind):
    layers = 1 if kind == "legacy" else 2
    small = save(tmp_path / "small", kind)
    expand(small, tmp_path / "large", layers=layers, dim=128)
    config = gt_jax.load(tmp_path / "large")[0].config
    assert (config.layers, config.dim, config.heads) == (layers, 128, 4)
    assert_close(logits(tmp_path / "large"), logits(small))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_wider_fusion_joins_copies_as_it_did(fusion):
    old, new = (config_of("gf", fusion=fusion, dim=32 * n, heads=2 * n) for n in (1, 3))
    weights = random_params(old, lambda path: "/fusion/" in path)
    wide = expand_module._widen(weights, old, new, np.random.default_rng(0))
    branches = np.random.default_rng(1).standard_normal((2, 2, 5, 32), np.float32)

    def fuse(config, weights, branches):
        weights = {path.removeprefix("blocks_0/fusion/"): x for path, x in weights.items()}
        module = FUSIONS[config.fusion](config)
        return jit(module.apply)({"params": unflatten_dict(weights, sep="/")}, *branches)[0]

    want = np.tile(fuse(old, weights, branches), 3)
    assert_close(fuse(new, wide, np.tile(branches, 3)), want)
    assert not np.any(fuse(old, weights, np.zeros_like(branches)))  # as in new, silent blocks


def test_copies_learn_apart_and_new_blocks_learn(tmp_path):
    expand(save(tmp_path / "small", "gf"), tmp_path / "large", layers=2, dim=128)
    model, weights, _ = gt_jax.load(tmp_path / "large")

    def loss(weights):
        return -jax.nn.log_softmax(model.apply({"params": weights}, TOKENS).logits)[..., 0].mean()

    grads = flatten_dict(jit(jax.grad(loss))(weights), sep="/")
    for path in (
        "embedding/embedding",
        "blocks_0/rwkv/receptance/kernel",
        "blocks_0/mamba/out_proj/kernel",
        "blocks_0/ffn/up/kernel",
    ):
        one, other = np.split(np.asarray(grads[path]), 2, axis=1)
        assert abs(one - other).mean() > 0.1 * abs(one).mean(), path
    for path in ("rwkv/output/kernel", "mamba/out_proj/kernel", "ffn/down/kernel"):
        assert np.any(grads[f"blocks_1/{path}"]), path


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("rwkv6", {}, "say what grows beyond --layers=1 and --dim=32"),
        ("rwkv6", {"layers": 0}, "--layers=0 must be at least the model's 1"),
        ("rwkv6", {"layers": 1025}, "model.layers=1025 must be at most 1024"),
        ("rwkv6", {"dim": 48}, "--dim=48 must be a multiple of the model's 32"),
        ("rwkv6", {"dim": 16}, "--dim=16 must be a multiple of the model's 32"),
        ("rwkv6", {"dim": 64}, r"ffn/key/kernel \[32, 96\] would have to be \[64, 224\]"),
        ("legacy", {"layers": 3}, "--layers=3 must be 1 for model.branch='legacy'"),
    ],
)
def test_expansion_that_cannot_keep_the_function_is_refused(tmp_path, kind, sizes, message):
    small = save(tmp_path / "small", kind, dim=32)
    with pytest.raises(InputError, match=message):
        expand(small, tmp_path / "large", **sizes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_command_line_expands(tmp_path, capsys):
    small = save(tmp_path / "small", "mamba2")
    __main__.main(["convert", "expand", str(small), str(tmp_path / "large"), "--layers=3"])
    assert "mamba2 of 1 x 64 (blocks x width) as one of 3 x 64" in capsys.readouterr().out
    assert gt_jax.load(tmp_path / "large")[0].config.layers == 3
