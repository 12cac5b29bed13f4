import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.errors import InputError
from gt_jax.generation import Request, complete, load_context, prefill, save_context
from gt_jax.generation.contexts import fingerprint
from gt_jax.models import make_model
from tests.models.small_models import random_tokens, small_config, small_model

TEXT = np.asarray(random_tokens(1, 150)[0])


@pytest.fixture(scope="module")
def gf():
    small = small_model("gf")
    return small.model, small.params


def draw(model, params, context, **settings):
    settings = {"max_tokens": 10, "seed": 5} | settings
    return complete(model, params, [Request(context, **settings)], rows=1)


def test_text_read_in_chunks_is_the_text_read_whole(gf):
    context = prefill(*gf, TEXT)
    assert (context.length, len(context.waiting)) == (150, 150 - 2 * 64)
    assert set(np.flatnonzero(context.seen)) == set(TEXT)
    whole = small_model("gf").apply({"params": gf[1]}, TEXT[None, :128]).state
    for ours, theirs in zip(jax.tree.leaves(context.state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_reading_on_continues_and_leaves_the_earlier_context_alone(gf):
    first = prefill(*gf, TEXT[:100])
    kept = jax.device_get(first)
    second = prefill(*gf, TEXT[100:], first)
    assert second.length == 150 and second.waiting[-1] == TEXT[-1]
    jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get(first))
    greedy = {"temperature": 0.0}
    assert draw(*gf, second, **greedy)[0].tokens == draw(*gf, TEXT, **greedy)[0].tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gf", "legacy-b2", "gpt2"])
def test_state_in_a_file_continues_identically(kind, dtype, tmp_path):
    small = small_model(kind, dtype=dtype, max_positions=200)
    context = prefill(small.model, small.params, TEXT)
    path = tmp_path / "state"
    save_context(path, small.model, small.params, context)
    loaded = load_context(path, small.model, small.params)
    same = lambda a, b: np.testing.assert_array_equal(a, b, strict=True)
    jax.tree.map(same, jax.device_get(context), jax.device_get(loaded))
    if kind == "gf":
        settings = {"repetition_penalty": 1.3}
        before = draw(small.model, small.params, context, **settings)
        assert before == draw(small.model, small.params, loaded, **settings)


def test_state_of_one_dtype_is_loaded_by_the_same_model_in_another(gf, tmp_path):
    save_context(tmp_path / "state", *gf, prefill(*gf, TEXT))
    half = make_model(small_config(fusion="gf", gate_init=0.3, dtype="bfloat16"))
    loaded = load_context(tmp_path / "state", half, gf[1])
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(loaded.state)}
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("bfloat16")}


def test_state_of_an_earlier_version_lacks_fields_that_are_at_their_defaults(gf, tmp_path):
    """But not one that this model has set to something else."""
    path = tmp_path / "state"
    save_context(path, *gf, prefill(*gf, TEXT[:5]))
    stored = dict(np.load(path))
    about = json.loads(str(stored["about"]))
    assert about["model"].pop("residual") == "none"
    with open(path, "wb") as file:
        np.savez(file, **stored | {"about": json.dumps(about)})
    assert load_context(path, *gf).length == 5
    other = small_model("gf", residual="mamba")
    with pytest.raises(InputError, match=r"its model\.residual is 'none', this one's 'mamba'"):
        load_context(path, other.model, other.params)


def test_state_of_another_model_is_refused(gf, tmp_path):
    path = tmp_path / "state"
    save_context(path, *gf, prefill(*gf, TEXT))
    with pytest.raises(InputError, match=r"another model: its model.fusion is 'gf', .* 'gru'"):
        load_context(path, *small_model("gru")[:2])
    other = jax.tree.map(lambda x: x + 0.1, gf[1])
    with pytest.raises(InputError, match=r"other parameters; use the checkpoint it was saved"):
        load_context(path, gf[0], other)


def rewrite(path, **changes):
    """The archive at path with arrays changed, or removed where None."""
    with np.load(path) as file:
        arrays = dict(file) | changes
    with path.open("wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b""), "no saved state, or damaged"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and so on"), "no saved state, or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "no saved state, or damaged"),
        (lambda path: flip_a_bit(path), "no saved state, or damaged"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "no saved state, or damaged"),
        (lambda path: rewrite(path, about=None), "no saved state, or damaged"),
        (lambda path: rewrite(path, about=np.array(json.dumps([1]))), "or damaged"),
        (lambda path: rewrite(path, about=np.array([{}], object)), "or damaged"),
        (lambda path: rewrite(path, waiting=None), "no saved state, or damaged"),
        (lambda path: rewrite(path, waiting=np.zeros(0, np.int32)), "other shapes"),
        (lambda path: rewrite(path, waiting=np.array([99])), "other shapes"),
        (lambda path: rewrite(path, seen=np.zeros(3, bool)), "other shapes"),
        (lambda path: rewrite(path, **{"0.rwkv.wkv": None}), "other shapes"),
        (lambda path: rewrite(path, **{"0.rwkv.wkv": np.zeros((1, 2, 3))}), "other shapes"),
        (lambda path: rewrite(path, more=np.zeros(3)), "other shapes"),
    ],
)  # fmt: skip
def test_damaged_file_is_refused(gf, damage, message, tmp_path):
    path = tmp_path / "state"
    save_context(path, *gf, prefill(*gf, TEXT[:5]))
    damage(path)
    with pytest.raises(InputError) as caught:
        load_context(path, *gf)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_fingerprint_sees_every_value_and_its_place(gf):
    params = {"a": jnp.arange(6.0), "b": jnp.zeros((2, 2), jnp.bfloat16)}
    others = [
        params | {"a": jnp.arange(6.0)[::-1]},
        params | {"a": jnp.arange(6.0).at[3].set(3.0000002)},
        params | {"b": jnp.zeros((2, 2), jnp.bfloat16).at[1, 1].set(-0.0)},
        {"a": params["a"], "c": params["b"]},
    ]
    assert len({fingerprint(p) for p in [params, *others]}) == 5
    assert fingerprint(params) == fingerprint(jax.tree.map(np.asarray, params))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "prompt is empty"),
        ([3, 17], "the id 17; ids are 0 to 16"),
        ([-1], "the id -1"),
        ([1, 2.5], "prompt holds 2.5, which is no token id"),
    ],
)
def test_impossible_text_is_refused(gf, tokens, message):
    with pytest.raises(InputError, match=message):
        prefill(*gf, tokens)
