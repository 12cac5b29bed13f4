"""A trace against one plain application of the same model and NumPy on what it gives."""

import numpy as np
import pytest

from gt_jax.analysis import trace
from gt_jax.models import make_model
from tests.models import small_models
from tests.models.small_models import lively_parameters

T = 23
WHOLE = 20  # tokens in whole chunks of 4
# Chunks sum in another order: what float32 keeps of that through two lively blocks.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# Kind -> what to change in it, for the sake of compile time.
KINDS = {
    "gru": {"branch": "legacy", "layers": 1},
    "legacy-b2": {},
    "rwkv6": {"layers": 1},
    "rwkv6-legacy": {"layers": 1},
    "mamba2": {},
    "gpt2": {"layers": 1},
}


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 17, T, dtype=np.int32)


def small(kind):
    """A model of small_models.KINDS, changed as KINDS says, and its parameters."""
    model = make_model(small_models.small_config(**(small_models.KINDS[kind] | KINDS[kind])))
    return model, lively_parameters(model, np.zeros((1, 1), np.int32))


def memory_norms(kind, state):
    """Part -> norm of one block's memory, in float64."""
    size = lambda x: np.sqrt(np.sum(np.asarray(x, np.float64) ** 2))
    match kind:
        case "gpt2":
            return {}
        case "mamba2":
            return {"mamba": size(state.ssm)}
        case "rwkv6":
            return {"rwkv": size(state.rwkv.wkv)}
        case "rwkv6-legacy":
            return {"rwkv": size(state)}
        case "legacy-b2":
            return {"rwkv": size(state.rwkv.numerator), "mamba": size(state.mamba.ssm)}
        case "gru":
            norms = {"rwkv": size(state.rwkv), "mamba": size(state.mamba.ssm)}
            return norms | {"fusion": size(state.fusion)}


@pytest.mark.parametrize("kind", KINDS)
def test_trace_in_chunks_is_what_one_application_gives(kind, ids):
    model, params = small(kind)
    layers = model.config.layers
    found = trace(model, params, ids, points=6)
    assert found.stride == 4
    whole = small_models.jit(lambda p, x: model.apply({"params": p}, x, mutable="activations"))
    output, sown = whole(params, ids[None, :WHOLE])

    logits = np.asarray(output.logits[0], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)  # of tokens 1 to WHOLE
    after = slice(1, WHOLE + 1)
    assert np.isnan(found.loss[0]) and found.loss.shape == (T,)
    expected = -np.log(p[np.arange(WHOLE), ids[after]])
    np.testing.assert_allclose(found.loss[after], expected, **TOLERANCE)
    np.testing.assert_allclose(found.chances[after], -np.sort(-p)[:, :3], **TOLERANCE)
    guessed = np.take_along_axis(p, found.guesses[after], axis=-1)
    np.testing.assert_allclose(found.chances[after], guessed, **TOLERANCE)

    if model.config.architecture != "hybrid":
        assert found.blocks == {}
    else:
        blocks = [sown["activations"][f"blocks_{i}"] for i in range(layers)]
        r, m = (np.asarray([x[n][0][0] for x in blocks]) for n in ("rwkv_out", "mamba_out"))
        lengths = np.linalg.norm(r, axis=-1) * np.linalg.norm(m, axis=-1)
        cosine = np.sum(r * m, axis=-1) / lengths
        np.testing.assert_allclose(found.blocks["cosine"][:, :WHOLE], cosine, **TOLERANCE)
        gates = np.asarray([np.mean(x["fusion"]["gate"][0], axis=-1) for x in blocks])
        gates = np.broadcast_to(gates.reshape(layers, -1), (layers, WHOLE))
        np.testing.assert_allclose(found.blocks["gate"][:, :WHOLE], gates, **TOLERANCE)
        assert found.blocks["share"].shape == (layers, T)

    # The last point: the 3 tokens left over fill no chunk.
    for layer, block in enumerate(output.state):
        expected = memory_norms(kind, block)
        assert expected.keys() == found.states.keys()
        for part, value in expected.items():
            assert found.states[part].shape == (layers, 5)
            np.testing.assert_allclose(found.states[part][layer, -1], value, rtol=1e-4)


def test_short_text_has_a_point_a_token(ids):
    model, params = small("mamba2")
    single, chunks = trace(model, params, ids), trace(model, params, ids, points=6)
    assert single.stride == 1 and chunks.stride == 4
    np.testing.assert_allclose(single.loss, chunks.loss, **TOLERANCE)
    np.testing.assert_allclose(single.states["mamba"][:, 3::4], chunks.states["mamba"], rtol=1e-4)
