"""Import and export: what comes back, in every layout and file format, and the command line."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import gt_jax
from gt_jax import checkpoint, cli
from gt_jax.convert import LAYOUTS, __main__, export_model, files, import_model
from gt_jax.convert.layout import read_params
from gt_jax.data.pretrained import IdTokenizer, WorldTokenizer
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.errors import InputError
from gt_jax.generation import generate
from gt_jax.models import make_model
from gt_jax.models.layers import rms_norm
from tests.convert import small

PAIRS = [
    (name, layout)
    for name, config in small.MODELS.items()
    for layout in LAYOUTS
    if LAYOUTS[layout].architecture == config.architecture
    and (LAYOUTS[layout].states or not config.learned_states)
]


def need_safetensors(layout):
    if LAYOUTS[layout].weights == "model.safetensors":
        pytest.importorskip("safetensors")


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_export_and_import_give_the_same_model(tmp_path, name, layout):
    need_safetensors(layout)
    there = tmp_path / ("there.pth" if LAYOUTS[layout].weights is None else "there")
    export_model(small.save(name, tmp_path / "ours"), there, layout=layout)
    import_model(there, tmp_path / "back")
    model, params, tokenizer = gt_jax.load(tmp_path / "back")
    assert model.config == small.MODELS[name]
    small.assert_same(params, small.params_of(name))
    assert tokenizer.vocab_size == small.VOCAB


@pytest.mark.parametrize("layout", ["mamba2-hf", "mamba-ssm"])
def test_folders_of_other_libraries_have_the_tokenizer_for_transformers_and_for_us(
    tmp_path, layout
):
    need_safetensors(layout)
    tokenizer = CharTokenizer("\n " + "".join(map(chr, range(0x61, 0x61 + small.VOCAB - 2))))
    small.save("mamba2", tmp_path / "ours", tokenizer)
    export_model(tmp_path / "ours", tmp_path / "there", layout=layout)
    import_model(tmp_path / "there", tmp_path / "back")
    back = gt_jax.load(tmp_path / "back")[2]
    assert back.to_dict() == tokenizer.to_dict()
    transformers = pytest.importorskip("transformers", reason="the oracle")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "there")
    text = "abc\nbad  hi"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text


@pytest.mark.parametrize("layout", ["mamba-ssm", "mamba2-hf"])
def test_large_models_are_written_and_read_in_shards(tmp_path, monkeypatch, layout):
    need_safetensors(layout)
    monkeypatch.setattr(files, "SHARD_BYTES", 50_000)
    folder = small.store("mamba2", layout, tmp_path)
    weights = LAYOUTS[layout].weights
    index = json.loads((folder / f"{weights}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert not (folder / weights).exists()
    found = files.read(folder)
    params = read_params(LAYOUTS[layout], small.MODELS["mamba2"], found.tensors)
    small.assert_same(params, small.params_of("mamba2"))


def test_a_header_of_any_length_is_one_of_safetensors(tmp_path):
    """The first byte of the file is the last of the header's length; pickles begin with 0x80."""
    numpy = pytest.importorskip("safetensors.numpy")
    first_bytes = set()
    for length in range(0, 256, 8):
        path, note = tmp_path / f"{length}.safetensors", {"note": "x" * length}
        numpy.save_file({"a": np.ones(3, np.float32)}, path, metadata=note)
        first_bytes.add(path.read_bytes()[0])
        np.testing.assert_array_equal(files.read(path).tensors["a"].read(), np.ones(3))
    assert 0x80 in first_bytes


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_point_types_are_read(tmp_path, suffix, dtype):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    arrays = small.arrays_of("rwkv6", "rwkv-lm")
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    files.write(tmp_path / f"a{suffix}", arrays)
    tensors = files.read(tmp_path / f"a{suffix}").tensors
    params = read_params(LAYOUTS["rwkv-lm"], small.MODELS["rwkv6"], tensors)
    want = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.testing.assert_array_equal(params["embedding"]["embedding"], want["emb.weight"])
    np.testing.assert_array_equal(params["head"], want["head.weight"].T)


def test_a_tied_head_may_be_left_out_or_repeated(tmp_path):
    layout, config = LAYOUTS["mamba2-hf"], small.MODELS["mamba2-tied"]
    arrays = small.arrays_of("mamba2-tied", "mamba2-hf")
    for names in (set(arrays), set(arrays) - {"lm_head.weight"}):
        files.write(tmp_path / "a.bin", {name: arrays[name] for name in names})
        params = read_params(layout, config, files.read(tmp_path / "a.bin").tensors)
        small.assert_same(params, small.params_of("mamba2-tied"))


@pytest.mark.parametrize(("dim", "mix", "decay"), [(2048, 32, 64), (2560, 32, 64), (4096, 64, 128)])
def test_ranks_are_those_of_the_official_models(dim, mix, decay):
    """RWKV-6 1.6B, 3B and 7B."""
    config = dataclasses.replace(small.MODELS["rwkv6"], dim=dim, heads=dim // 64)
    key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    mixer = jax.eval_shape(make_model(config).init, key, tokens)["params"]["blocks_1"]["rwkv"]
    assert mixer["time_maa_w1"].shape == (dim, 5 * mix)
    assert mixer["time_decay_w2"].shape == (decay, dim)


def test_norms_of_a_pure_mamba2_model_have_the_published_eps():
    assert rms_norm(small.MODELS["mamba2"], "norm").epsilon == 1e-5


def test_tokenizer_travels_with_the_model(tmp_path):
    pytest.importorskip("safetensors")
    lines = [f"{i} '{i:x}' {len(f'{i:x}')}\n" for i in range(1, small.VOCAB)]
    tokenizer = WorldTokenizer(WorldTokenizer.pack("".join(lines)))
    small.save("rwkv6", tmp_path / "ours", tokenizer)
    export_model(tmp_path / "ours", tmp_path / "there", layout="rwkv-hf")
    import_model(tmp_path / "there", tmp_path / "back")
    back = gt_jax.load(tmp_path / "back")[2]
    assert back.encode("f1b").tolist() == [15, 27]
    assert back.to_dict() == tokenizer.to_dict()
    # Some folders on Hugging Face call the same file vocab.txt.
    (tmp_path / "there" / "rwkv_vocab_v20230424.txt").rename(tmp_path / "there" / "vocab.txt")
    import_model(tmp_path / "there", tmp_path / "again")
    assert gt_jax.load(tmp_path / "again")[2].to_dict() == tokenizer.to_dict()
    # Older ones leave out the ids and lengths: there a line's place is its id.
    literals = ["b'<s>'", *(repr(f"{i:x}".encode()) for i in range(1, small.VOCAB))]
    (tmp_path / "there" / "vocab.txt").write_text("\n".join(literals) + "\n")
    import_model(tmp_path / "there", tmp_path / "older")
    older = gt_jax.load(tmp_path / "older")[2]
    assert older.vocab_size == small.VOCAB and older.stop_ids == tokenizer.stop_ids
    for i in range(small.VOCAB):
        assert older.token_bytes(i) == tokenizer.token_bytes(i)
    assert older.encode("f1b").tolist() == [15, 27]
    (tmp_path / "there" / "vocab.txt").write_text("b'<s>'\nb'a\n")
    with pytest.raises(InputError, match=r"is no line of an RWKV vocabulary.*--tokenizer=ids"):
        import_model(tmp_path / "there", tmp_path / "damaged")


def run(*words):
    return __main__.main(["convert", *map(str, words)])


def test_command_line_imports_a_model_that_generates(tmp_path, capsys):
    run("import", small.store("rwkv6", "rwkv-lm", tmp_path), tmp_path / "a")
    assert "rwkv6 of 2 blocks, dim 64, vocabulary 29, read as rwkv-lm" in capsys.readouterr().out
    model, params, tokenizer = gt_jax.load(tmp_path / "a")
    ids = list(generate(model, params, tokenizer.encode("1 2 3"), max_tokens=4))
    assert all(0 <= i < small.VOCAB for i in ids)
    run("export", tmp_path / "a", tmp_path / "b.pth", "--format=rwkv-lm")
    assert (tmp_path / "b.pth").read_bytes() == (tmp_path / "model.pth").read_bytes()
    run("--help")
    assert (
        "fla        flash-linear-attention's RWKV6ForCausalLM, a folder" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say import SRC DST, or export SRC DST"),
        (("import", "a"), "say import SRC DST"),
        (("import", "a", "b", "--what=1"), "--what is not a flag"),
        (("export", "ours", "b.pth"), "--format=None for mamba2 of 2 blocks.*must be mamba-ssm or"),
        (("export", "ours", "b", "--format=fla"), "must be mamba-ssm or mamba2-hf"),
        (("export", "nothing", "b", "--format=fla"), "holds no checkpoint"),
        (("import", "ours", "ours"), "ours exists; name another place"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    small.save("mamba2", tmp_path / "ours")
    monkeypatch.setattr(sys, "argv", ["convert", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.run(__main__.main)
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    with pytest.raises(InputError, match=message):
        raise InputError(printed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_model_without_feed_forward_has_no_layout_but_pytorch(tmp_path):
    config = dataclasses.replace(small.MODELS["rwkv6"], feed_forward=False)
    params = flatten_dict(small.params_of("rwkv6"))
    params = {p: x for p, x in params.items() if not any(name.startswith("ffn") for name in p)}
    params = unflatten_dict(params)
    checkpoint.save_model(tmp_path / "ours", config, params, IdTokenizer(small.VOCAB))
    message = "--format=fla for rwkv6, without feed-forward, of 2 blocks.* must be pytorch"
    with pytest.raises(InputError, match=message):
        export_model(tmp_path / "ours", tmp_path / "b", layout="fla")
    assert not (tmp_path / "b").exists()


def test_file_of_another_kind_is_refused(tmp_path):
    small.save("rwkv6", tmp_path / "ours")
    with pytest.raises(InputError, match=r"must end in .pth or .safetensors"):
        export_model(tmp_path / "ours", tmp_path / "b.bin", layout="rwkv-lm")


def test_what_cannot_hold_learned_states_says_so(tmp_path):
    ours = small.save("rwkv6-states", tmp_path / "ours")
    message = "--format=fla for rwkv6 with learned states, .* must be rwkv-lm or pytorch"
    with pytest.raises(InputError, match=message):
        export_model(ours, tmp_path / "theirs", layout="fla")
