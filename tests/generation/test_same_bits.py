"""A text gives the same bits however it is read: whole or in parts, alone or not, from a file."""

import functools

import jax
import numpy as np
import pytest

from gt_jax.generation import Request, complete, contexts, load_context, prefill, save_context
from tests.models.small_models import random_tokens, small_model

pytestmark = pytest.mark.optimized

TEXT = np.asarray(random_tokens(1, 1500)[0])
ROWS = 3


def model_of(kind, **fields):
    small = small_model(kind, max_positions=1600, **fields)
    return small.model, small.params


def read(model, ends, *, path=None):
    """The context of TEXT[: ends[-1]], read in parts that end there; by way of a file at `path`."""
    context, start = None, 0
    for end in ends:
        context = prefill(*model, TEXT[start:end], context)
        start = end
        if path:
            save_context(path, *model, context)
            context = load_context(path, *model)
    return context


def equal(one, other):
    same = lambda a, b: np.testing.assert_array_equal(a, b, strict=True)
    jax.tree.map(same, jax.device_get(one), jax.device_get(other))


def draw(model, *prompts, company=None):
    """Completions of these prompts, drawn side by side; the others with settings of `company`."""
    settings = [{"temperature": 0.0}, *[{"seed": 3} | (company or {})] * 3]
    requests = [Request(p, max_tokens=12, **s) for p, s in zip(prompts, settings)]
    return complete(*model, requests, rows=ROWS)


def check_bits(model, path, **company):
    parts = [
        range(64, 1500, 64),
        (64, 192, 1088, 1152),
        (1, 65, 130, 1024, 1025, 1281),
        (1498, 1499),
    ]
    whole = read(model, [1500])
    for ends in parts:
        equal(read(model, [*ends, 1500]), whole)
    equal(read(model, [700, 1400, 1500], path=path), whole)
    alone = draw(model, TEXT[:1500])[0]
    others = [TEXT[3:80], TEXT[:1500], TEXT[9:11]]
    assert draw(model, whole, *others, company=company)[0] == alone == draw(model, whole)[0]
    assert draw(model, TEXT[:1500], *others, company=company)[0] == alone


@pytest.mark.parametrize("kind", ["gf", "gpt1"])  # attention sums in other orders at other widths
def test_bits_do_not_depend_on_how_a_text_is_read(kind, tmp_path):
    check_bits(model_of(kind, layers=1), tmp_path / "state")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="the same on a CPU stands above")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gf", "gru", "rwkv6", "mamba2"])
def test_bits_do_not_depend_on_how_a_text_is_read_on_a_gpu(kind, dtype, tmp_path):
    model = model_of(kind, dtype=dtype, dim=256, heads=4)
    check_bits(model, tmp_path / "state", top_p=0.9, top_logprobs=3)


def test_chunks_are_those_of_the_whole_text(monkeypatch):
    """For every length and every way to arrive at it; no state is computed."""
    monkeypatch.setattr(contexts, "PREFILL_CHUNKS", (4, 8, 32))
    monkeypatch.setattr(contexts, "_prefill_chunk", lambda m, p, tokens, state: (*state, *tokens))
    monkeypatch.setattr(contexts, "start_state", lambda *_: ())
    model = model_of("gf")
    in_parts = functools.cache(lambda *ends: read(model, ends))
    sizes = lambda context: [part.size for part in context.state]
    for length in range(1, 110):
        whole = in_parts(length)
        greedy, left = [], length
        while left > 4:
            greedy.append(max(size for size in (4, 8, 32) if size < left))
            left -= greedy[-1]
        assert sizes(whole) == greedy
        for earlier in range(1, length):
            equal(prefill(*model, TEXT[earlier:length], in_parts(earlier)), whole)
        equal(prefill(*model, [], whole), whole)


def test_text_that_grows_token_by_token_is_read_a_few_times(monkeypatch):
    """At most once in a chunk of each size."""
    monkeypatch.setattr(contexts, "PREFILL_CHUNKS", (4, 8, 32))
    tokens = []
    monkeypatch.setattr(
        contexts, "_prefill_chunk", lambda m, p, part, state: tokens.extend(part[0]) or state
    )
    read(model_of("gf"), range(1, 513))
    assert len(tokens) <= 3 * 512


def test_context_of_an_earlier_version_is_continued(tmp_path):
    """It has no marks, so nothing is read again."""
    model = model_of("mamba2", layers=1)
    path = tmp_path / "state"
    before = read(model, [300])
    save_context(path, *model, before._replace(marks=(), recent=np.zeros(0, np.int32)))
    loaded = load_context(path, *model)
    assert loaded.marks == () and not len(loaded.recent)
    context = prefill(*model, TEXT[300:1200], loaded)
    for ours, theirs in zip(*map(jax.tree.leaves, (context.state, read(model, [1200]).state))):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
