import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.data import tokenizer_from_dict
from gt_jax.errors import InputError
from gt_jax.generate import encode_prompt, generate, keep_top_k, keep_top_p, sample, stream
from gt_jax.models import make_config, make_model

PROMPT = np.array([1, 5, 2, 7, 3, 3, 0], np.int32)


@pytest.fixture(scope="module")
def model():
    return make_model(make_config("gf-mh", vocab_size=9, dim=32, layers=1, heads=2, state_size=8))


@pytest.fixture(scope="module")
def params(model):
    fresh = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    # Far from uniform, so that the likeliest token is no matter of rounding.
    return jax.tree.map(lambda x: 3 * x, fresh)


def test_greedy_text_is_what_the_parallel_form_finds_likeliest(model, params):
    tokens = list(generate(model, params, PROMPT, max_tokens=8, temperature=0))
    whole = np.concatenate([PROMPT, tokens])
    logits = jax.jit(model.apply)({"params": params}, whole[None]).logits[0]
    assert tokens == np.argmax(logits, -1)[len(PROMPT) - 1 : -1].tolist()


def test_same_seed_gives_the_same_text_and_another_seed_another(model, params):
    draw = lambda seed: list(generate(model, params, PROMPT, max_tokens=12, seed=seed))
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "--temperature=-1.0 must be 0 or more"),
        ({"top_p": 0.0}, "--top_p=0.0 must be above 0, at most 1"),
        ({"top_k": -2}, "--top_k=-2 must be 0 or more"),
        ({"max_tokens": 0}, "--max_tokens=0 must be at least 1"),
        ({"prompt": []}, "--prompt is empty"),
    ],
)
def test_impossible_setting_is_refused_before_anything_runs(model, setting, message):
    settings = {"prompt": PROMPT, "max_tokens": 4} | setting
    with pytest.raises(InputError) as caught:
        generate(model, None, settings.pop("prompt"), **settings)
    assert message in str(caught.value)


def test_attention_model_is_not_asked_for_more_than_its_positions():
    gpt = make_model(make_config("gpt2", vocab_size=9, max_positions=10))
    with pytest.raises(InputError, match=r"--max_tokens=4 after a prompt of 7 .* 10 positions"):
        generate(gpt, None, PROMPT, max_tokens=4)


def test_top_k_and_top_p_keep_the_fewest_likeliest_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]))
    kept = lambda cut: np.isfinite(cut).tolist()
    assert kept(keep_top_k(logits, 2))[0] == [False, True, False, True]
    assert kept(keep_top_k(logits, 0)) == kept(keep_top_k(logits, 9)) == [[True] * 4] * 2
    assert kept(keep_top_p(logits, 0.69)) == [
        [False, True, False, True],
        [True, False, False, False],
    ]
    assert kept(keep_top_p(logits, 0.71))[0] == [False, True, True, True]
    assert kept(keep_top_p(logits, 1e-9)) == [
        [False, True, False, False],
        [True, False, False, False],
    ]
    assert kept(keep_top_p(logits, 1.0)) == [[True] * 4] * 2


def test_samples_follow_the_tempered_distribution():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.6, 0.3])), (20_000, 3))
    tokens = sample(jax.random.key(0), logits, temperature=0.5)
    expected = np.array([0.1, 0.6, 0.3]) ** 2
    shares = np.bincount(tokens, minlength=3) / len(tokens)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.015)
    assert (sample(jax.random.key(0), logits, temperature=0.0) == 1).all()


@pytest.mark.parametrize("kind", ["char", "char97"])
def test_prompt_outside_the_vocabulary_is_refused_with_its_characters(kind):
    tokenizer = tokenizer_from_dict({"kind": kind, "alphabet": "abc"})
    assert tokenizer.decode(encode_prompt(tokenizer, "cab", "--prompt")) == "cab"
    with pytest.raises(InputError, match=r"--prompt='aüz'.*'z'.*'ü'"):
        encode_prompt(tokenizer, "aüz", "--prompt")


def test_stream_holds_back_half_a_character():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    assert list(stream(Bytes(), b"a", "hé!".encode())) == ["h", "é", "!"]
