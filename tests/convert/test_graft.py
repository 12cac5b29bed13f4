"""Grafts: what the hybrid takes over and computes, and parents that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import gt_jax
from gt_jax import checkpoint
from gt_jax.convert import __main__, params
from gt_jax.convert.graft import graft
from gt_jax.data.pretrained import IdTokenizer
from gt_jax.errors import InputError
from gt_jax.models import hybrid, language_model, make_model, stream
from gt_jax.models.layers import RMSNorm
from gt_jax.models.rwkv6 import TimeMix
from tests.convert import small

TOKENS = np.random.default_rng(3).integers(0, small.VOCAB, (2, 24))


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """{"rwkv": folder, "mamba": folder}."""
    folder = tmp_path_factory.mktemp("parents")
    return {
        "rwkv": small.save("rwkv6", folder / "a"),
        "mamba": small.save("mamba2-tied", folder / "b"),
    }


def logits(model, params):
    return jax.jit(model.apply)({"params": params}, TOKENS).logits


def test_graft_without_rwkv_is_its_mamba_parent(parents, tmp_path, monkeypatch):
    """But for the eps of the norms, which is 1e-6 in hybrids and 1e-5 in Mamba-2."""
    for module in (hybrid, language_model, stream):
        monkeypatch.setattr(module, "rms_norm", lambda c, name: RMSNorm(1e-5, c.dtype, name=name))
    graft(**parents, target=tmp_path / "c", gate=0.3, rest="mamba")
    model, params, _ = gt_jax.load(tmp_path / "c")
    for block in ("blocks_0", "blocks_1"):
        params[block]["fusion"]["bias"] = jnp.full(1, -1e9)
    parent, its_params, _ = gt_jax.load(parents["mamba"])
    want = logits(parent, its_params)
    found = logits(model, params)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * abs(want).max())


def test_rwkv_branch_reads_what_it_read(parents, tmp_path):
    graft(**parents, target=tmp_path / "c")
    model, params, _ = gt_jax.load(tmp_path / "c")
    parent, its_params, _ = gt_jax.load(parents["rwkv"])
    x = jax.random.normal(jax.random.key(0), (2, 8, 64))

    def apply(config, block, x):
        return jax.jit(TimeMix(config, 1).apply)({"params": block["rwkv"]}, x)[0]

    block, its_block = params["blocks_1"], its_params["blocks_1"]
    want = apply(parent.config, its_block, x * its_block["mixer_norm"]["scale"])
    got = apply(model.config, block, x * block["mixer_norm"]["scale"])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max())


def test_graft_keeps_what_its_parents_carry_and_their_segments(parents, tmp_path):
    def changed(name, fields, more, target=None):
        stored = params.read(parents[name])
        config = dataclasses.replace(stored.config, **fields)
        stored = params.Stored(config, stored.params | more, stored.tokenizer)
        params.write(tmp_path / (target or name), stored)
        return tmp_path / (target or name)

    table = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    segments = {"segment_token": 2}, {"segment_embedding": table}
    rwkv = changed("rwkv", {"rwkv_carry": 0.5}, {})
    mamba = changed("mamba", *segments)
    assert "segment_embedding" in graft(rwkv, mamba, tmp_path / "c")
    model, found, _ = gt_jax.load(tmp_path / "c")
    assert (model.config.rwkv_carry, model.config.segment_token) == (0.5, 2)
    np.testing.assert_array_equal(found["segment_embedding"], table)
    graft(rwkv, mamba, tmp_path / "d", rest="rwkv")
    assert params.read(tmp_path / "d").config.segment_token is None
    normed = changed("rwkv", *segments, "normed")
    with pytest.raises(InputError, match="--rest=rwkv cannot take the segment embedding"):
        graft(normed, mamba, tmp_path / "e", rest="rwkv")


@pytest.mark.parametrize("fusion", ["gf", "hgf", "ws", "gru"])
def test_gate_has_the_chosen_share_whatever_it_reads(parents, tmp_path, fusion):
    graft(**parents, target=tmp_path / "c", fusion=fusion, gate=0.2)
    model, params, _ = gt_jax.load(tmp_path / "c")
    sow = jax.jit(lambda p: model.apply({"params": p}, TOKENS, mutable=["activations"])[1])
    sown = sow(params)
    gates = [sown["activations"][f"blocks_{i}"]["fusion"]["gate"][0] for i in range(2)]
    np.testing.assert_allclose(np.concatenate([g.ravel() for g in gates]), 0.2, rtol=1e-6)


def test_embedding_of_an_rwkv_parent_enters_the_blocks_as_it_did(parents, tmp_path):
    graft(**parents, target=tmp_path / "c", rest="rwkv")
    model, params, _ = gt_jax.load(tmp_path / "c")
    ours = small.params_of("rwkv6")
    x, norm = ours["embedding"]["embedding"], ours["blocks_0"]["embedding_norm"]
    unit = jax.nn.standardize(x, epsilon=1e-5)
    want = unit * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(params["embedding"]["embedding"], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(params["head"], ours["head"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], ours["final_norm"]["scale"])
    assert not model.config.tie_embeddings


def test_new_ends_follow_from_the_seed(parents, tmp_path):
    embeddings = []
    for name, seed in (("c", 1), ("d", 1), ("e", 2)):
        graft(**parents, target=tmp_path / name, rest="new", seed=seed)
        embeddings.append(gt_jax.load(tmp_path / name)[1]["embedding"]["embedding"])
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    assert not np.array_equal(embeddings[0], embeddings[2])


def test_command_line_says_what_came_from_where(parents, tmp_path, capsys):
    words = [f"--{name}={path}" for name, path in parents.items()]
    __main__.main(["convert", "graft", str(tmp_path / "c"), *words, "--gate=0.3"])
    printed = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split(maxsplit=2) for line in printed}
    assert list(rows) == ["embedding", "rwkv", "mamba", "fusion", "ffn", "norms", "total"]
    assert str(parents["rwkv"]) in rows["rwkv"][2]
    assert rows["embedding"][2] == str(parents["mamba"])
    assert rows["fusion"][2] == "new: gf, 30 % RWKV"
    counts = {name: int(row[1].replace(",", "")) for name, row in rows.items()}
    params = gt_jax.load(tmp_path / "c")[1]
    assert counts["total"] == sum(x.size for x in jax.tree.leaves(params))
    assert counts.pop("total") == sum(counts.values())


def misfit(folder, tokenizer=None, **changes):
    """A Mamba-2 that differs from the other parent's partner."""
    config = dataclasses.replace(small.MODELS["mamba2-tied"], **changes)
    init = make_model(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = {path: np.zeros(x.shape, np.float32) for path, x in flatten_dict(shapes).items()}
    tokenizer = tokenizer or IdTokenizer(config.vocab_size)
    checkpoint.save_model(folder, config, unflatten_dict(params), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 96}, r"model.dim must be the same in both parents: it is 64 in .*a and 96 in"),
        ({"layers": 3}, r"model.layers must be the same .* it is 2 in .*a and 3 in"),
        ({"vocab_size": 31}, r"model.vocab_size must be the same .* it is 29 in .*a and 31 in"),
        ({"tokenizer": IdTokenizer(20)}, r"tokenizers differ: ids of 29 ids in .* ids of 20 in"),
    ],
)
def test_parents_that_do_not_fit_are_named_with_both_values(parents, tmp_path, changes, message):
    misfit(tmp_path / "b", **changes)
    with pytest.raises(InputError, match=message):
        graft(parents["rwkv"], tmp_path / "b", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mamba": "rwkv"}, r"--mamba=.* holds a rwkv6, not mamba2"),
        ({"rwkv": "mamba"}, r"--rwkv=.* holds a mamba2, not rwkv6"),
        ({"rest": "both"}, "--rest=both must be one of rwkv, mamba, new"),
        ({"gate": 1.0}, "model.gate_init=1.0 must lie between 0 and 1"),
        ({"fusion": "fg"}, "model.fusion='fg' must be one of hy, gf, ws"),
        ({"fusion": "rf", "gate": 0.3}, "model.gate_init=0.3 has no meaning"),
    ],
)
def test_mistakes_in_arguments_are_named(parents, tmp_path, arguments, message):
    paths = {name: parents[arguments.pop(name, name)] for name in parents}
    with pytest.raises(InputError, match=message):
        graft(**paths, target=tmp_path / "c", **arguments)
    assert not list(tmp_path.iterdir())
