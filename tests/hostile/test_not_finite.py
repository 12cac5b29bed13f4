"""NaN and infinity in weights and states: refused wherever they are read or written."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gt_jax
from gt_jax import checkpoint, evaluate, generate
from gt_jax.convert import LAYOUTS, export_model, files, import_model
from gt_jax.convert.expand import expand
from gt_jax.convert.graft import graft
from gt_jax.data.pretrained import IdTokenizer
from gt_jax.errors import InputError
from gt_jax.generation import Request, complete, load_context, prefill, save_context
from gt_jax.scoring import continue_greedily, score
from tests.convert import small

FIX = "get the file again, or store the weights in a type with room for them, as float32$"


def store(layout, folder, change, dtype=np.float32):
    """A model in another library's layout whose tensors `change` has changed."""
    name = LAYOUTS[layout].architecture or "mamba2"  # our own layout takes every model
    arrays = {n: np.array(x, dtype) for n, x in small.arrays_of(name, layout).items()}
    change(arrays)
    path = folder / ("model" if LAYOUTS[layout].weights else "model.pth")
    if LAYOUTS[layout].weights is None:
        files.write(path, arrays)
    else:
        weights, config = LAYOUTS[layout].weights, small.config_of(name, layout)
        files.write_folder(path, weights, arrays, config)
    return path


def refuse_import(path, folder, message):
    with pytest.raises(InputError, match=message) as refused:
        import_model(path, folder / "new")
    assert str(refused.value).startswith(f"{path}: as float32 its weights are not finite: ")
    assert not (folder / "new").exists()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_import_of_every_layout_names_tensors_and_counts(tmp_path, layout):
    if layout not in ("rwkv-lm", "mamba-ssm"):
        pytest.importorskip("safetensors")
    changed = []

    def change(arrays):
        names = sorted(name for name in arrays if arrays[name].size > 60)[:5]
        for name in names:
            arrays[name].flat[[1, 7]] = np.nan
        arrays[names[0]].flat[3] = -np.inf
        changed.extend((names[0], arrays[names[0]]))

    path = store(layout, tmp_path, change)
    name, array = changed
    counts = rf"{list(array.shape)} holds 2 NaN and 1 infinite of {array.size:,} numbers; "
    counts = counts.replace("[", r"\[").replace("]", r"\]")
    refuse_import(path, tmp_path, rf"{name} {counts}.*; and 2 more; {FIX}")


@pytest.mark.parametrize(
    ("dtype", "number"),
    [(np.float64, 1e39), (np.float16, np.inf), (ml_dtypes.bfloat16, np.nan)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_import_of_every_type_that_is_not_finite_in_float32_is_refused(tmp_path, dtype, number):
    def change(arrays):
        arrays["head.weight"][2, 5] = number

    path = store("rwkv-lm", tmp_path, change, dtype)
    refuse_import(path, tmp_path, rf"head.weight \[29, 64\] holds 1 \w+ of 1,856 numbers; {FIX}")


def test_nan_in_a_tied_head_is_named_and_not_called_a_difference(tmp_path):
    arrays = small.arrays_of("mamba2-tied", "mamba-ssm")
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        arrays[name] = np.full_like(arrays[name], np.nan)
    config = small.config_of("mamba2-tied", "mamba-ssm")
    files.write_folder(tmp_path / "a", "pytorch_model.bin", arrays, config)
    refuse_import(tmp_path / "a", tmp_path, r"backbone.embedding.weight .* holds 1,856 NaN of")


@pytest.fixture(scope="module")
def written_before(tmp_path_factory):
    """A converted RWKV-6 with NaN, as versions wrote it that did not look."""
    folder = tmp_path_factory.mktemp("before") / "model"
    params = jax.tree.map(np.array, small.params_of("rwkv6"))
    params["blocks_1"]["rwkv"]["key"]["kernel"][3, :2] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "check_finite", lambda *args: None)
        tokenizer = IdTokenizer(small.VOCAB)
        checkpoint.save_model(folder, small.MODELS["rwkv6"], params, tokenizer)
    return folder


@pytest.mark.parametrize(
    "read",
    [
        lambda a, new: gt_jax.load(a),
        lambda a, new: generate.main(["", f"--checkpoint={a}", "--prompt=1 2"]),
        lambda a, new: evaluate.main(["", f"--checkpoint={a}", f"--source={a}/files.json"]),
        lambda a, new: export_model(a, new, layout="rwkv-lm"),
        lambda a, new: expand(a, new, layers=3),
        lambda a, new: graft(a, a, new),
    ],
    ids=["load", "generate", "evaluate", "export", "expand", "graft"],
)
def test_checkpoint_with_nan_is_refused_by_whatever_reads_it(written_before, tmp_path, read):
    message = (
        r"model: blocks_1/rwkv/key/kernel \[64, 64\] holds 2 NaN of 4,096 numbers; "
        "use an earlier checkpoint, or make this model again$"
    )
    with pytest.raises(InputError, match=message):
        read(written_before, tmp_path / "new.pth")
    assert not (tmp_path / "new.pth").exists()


def test_nan_is_not_written(tmp_path):
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), small.params_of("mamba2"))
    with pytest.raises(InputError, match=r"holds [\d,]+ infinite of .*; such a model is not writ"):
        checkpoint.save_model(
            tmp_path / "a", small.MODELS["mamba2"], params, IdTokenizer(small.VOCAB)
        )
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model, params, _ = gt_jax.load(small.save("mamba2", tmp_path_factory.mktemp("a") / "model"))
    return model, params


def test_saved_state_with_nan_is_refused(model, tmp_path):
    context = prefill(*model, np.arange(20))
    context = context._replace(state=jax.tree.map(lambda x: x * jnp.nan, context.state))
    save_context(tmp_path / "a.state", *model, context)
    with pytest.raises(InputError, match=r"a.state is no saved state, or damaged \(.* NaN of "):
        load_context(tmp_path / "a.state", *model)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A folder with finite weights whose products are not."""
    params = jax.tree.map(lambda x: np.full_like(x, 1e30), small.params_of("mamba2"))
    folder = tmp_path_factory.mktemp("huge") / "model"
    checkpoint.save_model(folder, small.MODELS["mamba2"], params, IdTokenizer(small.VOCAB))
    (folder.parent / "a.txt").write_text("1 2 3 4")
    return folder


@pytest.mark.parametrize(
    "use",
    [
        lambda folder, *model: complete(*model, [Request([1, 2], max_tokens=3)]),
        lambda folder, *model: score(*model, [([1], [2, 3])]),
        lambda folder, *model: continue_greedily(*model, [[1, 2]], max_tokens=3),
        lambda folder, *model: evaluate.main(
            ["", f"--checkpoint={folder}", f"--source={folder.parent / 'a.txt'}"]
        ),
    ],
    ids=["complete", "score", "continue_greedily", "evaluate"],
)
def test_probability_that_is_nan_is_no_result(overflowing, use):
    model, params, _ = gt_jax.load(overflowing)
    with pytest.raises(InputError, match="the model's probabilities are NaN: its weights are so"):
        use(overflowing, model, params)
