"""Against code that nobody here wrote: torch's files, the rwkv package, transformers.

Random models give the same logits here and there: for a prompt, then for tokens one at a time with
the carried state.

    pip install -e ".[interop-test]" && python -m pytest tests/convert
"""

import collections
import inspect
import os

import jax.numpy as jnp
import numpy as np
import pytest

import gt_jax
from gt_jax.convert import export_model, files, import_model
from tests.convert import small
from tests.models.small_models import jit

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

PROMPT, CONTINUED = 37, 64
TOLERANCE = 1e-4  # of the largest logit; float32 on both sides, other orders of summation
TOKENS = np.random.default_rng(1).integers(0, small.VOCAB, PROMPT + CONTINUED)


def our_logits(folder):
    """[PROMPT + CONTINUED, vocab] from the model in a folder: the prompt at once, then steps."""
    model, params, _ = gt_jax.load(folder)
    apply = jit(model.apply)
    output = apply({"params": params}, jnp.asarray(TOKENS[None, :PROMPT]))
    logits = [output.logits[0]]
    for token in TOKENS[PROMPT:]:
        output = apply({"params": params}, jnp.asarray([[token]]), output.state)
        logits.append(output.logits[0])
    return np.concatenate(logits)


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape == (len(TOKENS), small.VOCAB)
    assert np.abs(theirs).max() > 1  # far from trivial
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"largest difference / largest logit: {error:.1e}")
    assert error < TOLERANCE


# The rwkv package runs .pth files of RWKV-LM.


def rwkv_logits(path):
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    model = pytest.importorskip("rwkv.model").RWKV(str(path), strategy="cpu fp32", verbose=False)
    tokens = TOKENS.tolist()
    prompt, state = model.forward(tokens[:PROMPT], None, full_output=True)
    logits = [prompt.numpy()]
    for token in tokens[PROMPT:]:
        step, state = model.forward([token], state)
        logits.append(step.numpy()[None])
    return np.concatenate(logits)


@pytest.mark.parametrize("name", ["rwkv6", "rwkv6-states"])
def test_rwkv_package_runs_what_we_export(name, tmp_path):
    """The second with its learned states, which also come back."""
    ours = small.save(name, tmp_path / "ours")
    export_model(ours, tmp_path / "a.pth", layout="rwkv-lm")
    assert_close(our_logits(ours), rwkv_logits(tmp_path / "a.pth"))
    import_model(tmp_path / "a.pth", tmp_path / "back")
    small.assert_same(small.params_of(name), gt_jax.load(tmp_path / "back")[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_run_what_torch_saved_for_the_rwkv_package(tmp_path, dtype):
    arrays = small.arrays_of("rwkv6", "rwkv-lm")
    rounded = {name: torch.tensor(array).to(dtype) for name, array in arrays.items()}
    torch.save(rounded, tmp_path / "a.pth")
    import_model(tmp_path / "a.pth", tmp_path / "ours")
    # The package normalises embeddings in the type of the file, so it gets one of float32.
    torch.save({name: tensor.float() for name, tensor in rounded.items()}, tmp_path / "b.pth")
    assert_close(our_logits(tmp_path / "ours"), rwkv_logits(tmp_path / "b.pth"))


# transformers runs both kinds of Mamba-2 folder.


def transformers_model(tied):
    """Mamba2ForCausalLM with N(0, 0.3) for every parameter but A_log, which stays as it begins."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=small.VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=2,
        state_size=16,
        n_groups=1,
        chunk_size=16,
        tie_word_embeddings=tied,
    )
    model = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def transformers_logits(model):
    # What versions of transformers call the state, the newest first.
    arguments = inspect.signature(model.forward).parameters
    state = next(n for n in ("cache", "past_key_values", "cache_params") if n in arguments)
    output = model(torch.tensor(TOKENS[None, :PROMPT]), use_cache=True)
    logits = [output.logits[0].numpy()]
    for token in TOKENS[PROMPT:]:
        output = model(torch.tensor([[token]]), **{state: output[state]}, use_cache=True)
        logits.append(output.logits[0].numpy())
    return np.concatenate(logits)


@pytest.mark.parametrize("tied", [True, False])
def test_we_run_what_transformers_saved(tmp_path, tied):
    model = transformers_model(tied)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    import_model(tmp_path / "theirs", tmp_path / "ours")
    assert_close(our_logits(tmp_path / "ours"), transformers_logits(model))


@pytest.mark.parametrize("name", ["mamba2", "mamba2-tied"])
def test_transformers_runs_what_we_export(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    ours = small.save(name, tmp_path / "ours")
    export_model(ours, tmp_path / "theirs", layout="mamba2-hf")
    model, report = transformers.Mamba2ForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(report.values()), report
    assert_close(our_logits(ours), transformers_logits(model))


def test_mamba_ssm_files_are_those_of_transformers_but_for_one_name(tmp_path):
    """mamba_ssm itself needs a GPU; transformers takes its tensors."""
    model = transformers_model(tied=True)
    ours = tmp_path / "ours"
    names = {"backbone.embeddings.weight": "backbone.embedding.weight"}
    state_dict = {names.get(name, name): x for name, x in model.state_dict().items()}
    config = small.config_of("mamba2-tied", "mamba-ssm")
    files.write_folder(tmp_path / "theirs", "pytorch_model.bin", {}, config)
    torch.save(state_dict, tmp_path / "theirs" / "pytorch_model.bin")
    import_model(tmp_path / "theirs", ours)
    assert_close(our_logits(ours), transformers_logits(model))

    export_model(ours, tmp_path / "back", layout="mamba-ssm")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[name], state_dict[name]) for name in back)


# torch.save and torch.load.


def test_every_kind_of_tensor_that_torch_saves_is_read(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = collections.OrderedDict(
        whole=base,
        transposed=base.T,
        part=base[1:3, 2:5],
        parameter=torch.nn.Parameter(base.clone()),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
        half=base.half(),
        bfloat16=base.bfloat16(),
        double=base.double(),
        whole_numbers=torch.arange(5),
    )
    torch.save(tensors, tmp_path / "a.pth")
    found = files.read(tmp_path / "a.pth").tensors
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        array = found[name].read()
        assert found[name].shape == array.shape == tuple(tensor.shape)
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy())


def test_state_dict_of_a_module_is_read(tmp_path):
    module = torch.nn.Linear(3, 2)  # its state_dict carries attributes of its own
    torch.save(module.state_dict(), tmp_path / "a.pth")
    found = files.read(tmp_path / "a.pth").tensors
    np.testing.assert_array_equal(found["weight"].read(), module.weight.detach())


def test_torch_files_that_hold_more_are_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 2), tmp_path / "module.pth")
    with pytest.raises(gt_jax.errors.InputError, match="NEWOBJ, which tensors do not need"):
        files.read(tmp_path / "module.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(gt_jax.errors.InputError, match=r"format before 1\.6"):
        files.read(tmp_path / "old.pth")


def test_torch_loads_what_we_write(tmp_path):
    arrays = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.float32(2)[()].reshape(()),
        "half": np.arange(3, dtype=np.float16),
        "bfloat16": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
        "whole_numbers": np.arange(3),
    }
    files.write(tmp_path / "a.pth", arrays)
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert loaded[name].is_contiguous()
        np.testing.assert_array_equal(loaded[name].float().numpy(), array.astype(np.float32))
