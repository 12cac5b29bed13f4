"""Scores and texts against the harness's own HFLM, on one model and its exported folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import checkpoint, convert, harness
from gt_jax.data.hugging_face import HuggingFaceTokenizer
from gt_jax.data.pretrained import SpecialIds
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model

pytest.importorskip("torch", reason="HFLM runs on torch")
pytest.importorskip("transformers", reason="HFLM reads models with it")
hflm = pytest.importorskip("lm_eval.models.huggingface", reason="the harness's own adapter")
small_tokenizers = pytest.importorskip("tests.data.small_tokenizers")

PAIRS = [
    ("the cat", " sat"),
    ("the cat ", "sat"),
    ("the cat  \n ", "sat on"),
    ("the ca", "t sat"),
    ("", "the cat"),
    ("the cat sat on the mat", " the cat sat"),
    ("你好", "好 the"),
    ("the", "."),
]


class Request(tuple):
    """What both adapters look at of the harness's requests."""

    task_name = None

    @property
    def args(self):
        return tuple(self)


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def both(request, tmp_path_factory):
    """(our adapter, HFLM) of one random Mamba-2."""
    if request.param == "byte-level":
        made, special = small_tokenizers.byte_level(), SpecialIds(0, 0, 0)
    else:
        made, special = small_tokenizers.byte_fallback(start=True), SpecialIds(1, 2, 2)
    tokenizer = HuggingFaceTokenizer(made.to_str(), special)
    folder = tmp_path_factory.mktemp("hflm")
    config = ModelConfig(tokenizer.vocab_size, "mamba2", dim=32, layers=1, state_size=16)
    shapes = jax.eval_shape(
        make_model(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes["params"]
    )
    checkpoint.save_model(folder / "ours", config, params, tokenizer)
    convert.export_model(folder / "ours", folder / "theirs", layout="mamba2-hf")
    convert.import_model(folder / "theirs", folder / "back")
    # Its cache takes the wrong logits for requests that part the same text at other places.
    theirs = hflm.HFLM(
        str(folder / "theirs"), device="cpu", batch_size=1, dtype="float32", logits_cache=False
    )
    return harness.Adapter(folder / "back"), theirs


def test_scores_are_those_of_the_harness(both):
    ours, theirs = both
    compared = 0
    for pair, (mine, greedy) in zip(PAIRS, ours.loglikelihood(list(map(Request, PAIRS)))):
        try:
            (expected,) = theirs.loglikelihood([Request(pair)], disable_tqdm=True)
        except AssertionError:  # one token has the context's end and all of the continuation
            assert np.isfinite(mine)
            continue
        compared += 1
        assert (mine, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1]), pair
    assert compared >= len(PAIRS) - 1


def test_rolling_scores_are_those_of_the_harness(both):
    ours, theirs = both
    requests = [Request((text,)) for text in ("the cat sat on the mat.", "x", " ", "")]
    found = ours.loglikelihood_rolling(requests)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n"], "max_gen_toks": 9},
        {"until": "a", "max_new_tokens": 7},
        {"until": ["at", "c"], "max_tokens": 12},
        {"until": [], "max_completion_tokens": 3},
        {"until": [], "max_length": 14},
    ],
)
def test_texts_are_those_of_the_harness(both, settings):
    ours, theirs = both
    for context in ("the cat", "the mat "):
        request = Request((context, {"do_sample": False, **settings}))
        found = ours.generate_until([request])
        assert found == theirs.generate_until([request], disable_tqdm=True)


def test_requests_with_an_empty_side_have_answers(both):
    ours, _ = both
    nothing, spaces, neither = ours.loglikelihood(
        [Request(("the cat", "")), Request(("  ", "cat")), Request(("", ""))]
    )
    assert nothing == neither == (0.0, True) and spaces[0] < 0
    assert isinstance(
        ours.generate_until([Request(("", {"max_gen_toks": 2, "until": None}))])[0], str
    )
    with pytest.raises(InputError, match="max_length=1 leaves no token to generate"):
        ours.generate_until([Request(("the cat sat", {"max_length": 1}))])
