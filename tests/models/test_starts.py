"""Documents that begin with a learned state: as if the recurrence were reset to it, not to zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gt_jax.errors import InputError
from gt_jax.generation.contexts import start_prefill
from gt_jax.kernels import ssd, wkv6
from gt_jax.kernels.cases import ssd_inputs, wkv6_inputs
from gt_jax.kernels.pallas import devices
from gt_jax.models import starts
from gt_jax.models.carry import first_state, start_documents
from gt_jax.scoring import score
from tests.kernels.accuracy import assert_accurate
from tests.kernels.hopper_kernels import too_old
from tests.models.small_models import random_tokens, small_config, small_model

T = 37
IDS = jnp.array([[0] * 19 + [1] + [2] * 17, [0] * 37])  # the second row is one document
NAMES = {"wkv6": ("r", "k", "v", "w", "u", "start"), "ssd": ("x", "dt", "A", "B", "C", "start")}
IMPLS = [
    ("reference", "float64"),
    ("chunked", "float32"),
    pytest.param("portable", "bfloat16", marks=too_old),
]


def inputs_of(op, dtype):
    """Arrays for an op, what kernels multiply in `dtype`; the state of one row is the start."""
    if op == "wkv6":
        arrays, multiplied = wkv6_inputs("minus_inf", 2, T, 2, 32, 32), (0, 1, 2)
    else:
        x, dt, A, B, C, _, state = ssd_inputs("wide", 2, T, 4, 2, 32, 16)
        arrays, multiplied = (x, dt, A, B, C, state), (0, 3, 4)
    *arrays, state = arrays
    others = "float64" if dtype == "float64" else "float32"
    types = [dtype if n in multiplied else others for n in range(5)]
    return tuple(map(jnp.asarray, [*arrays, np.asarray(state)[0]], [*types, others]))


def with_kernel(op, impl):
    def wkv6_of(r, k, v, w, u, start):
        options = {"initial_state": starts.repeated(start, 2), "segment_ids": IDS, "impl": impl}
        return starts.add_to_wkv6(*wkv6(r, k, v, w, u, **options), start, r, w, IDS)

    def ssd_of(x, dt, A, B, C, start):
        options = {"initial_state": starts.repeated(start, 2), "segment_ids": IDS, "impl": impl}
        y, state = ssd(x, dt, A, B, C, **options)
        return starts.add_to_ssd(y, state, start, dt * A, C, IDS)

    return {"wkv6": wkv6_of, "ssd": ssd_of}[op]


def wkv6_loop(r, k, v, w, u, start):
    def step(state, inputs):
        r, k, v, w, begins = inputs
        state = jnp.where(begins[:, None, None, None], start, state)
        kv = k[..., None] * v[..., None, :]
        y = jnp.einsum("bhk,bhkv->bhv", r, state + u[..., None] * kv)
        return jnp.exp(w)[..., None] * state + kv, y

    return loop(step, start, r, k, v, w)


def ssd_loop(x, dt, A, B, C, start):
    def step(state, inputs):
        x, dt, B, C, begins = inputs
        state = jnp.where(begins[:, None, None, None], start, state)
        xB = dt[..., None, None] * x[..., None] * B[..., None, :]
        state = jnp.exp(dt * A)[..., None, None] * state + xB
        return state, jnp.einsum("bhpn,bhn->bhp", state, C)

    B, C = (jnp.repeat(z, 2, axis=2) for z in (B, C))
    return loop(step, start, x, dt, B, C)


def loop(step, start, *arrays):
    by_token = [z.swapaxes(0, 1) for z in (*arrays, jnp.roll(IDS, 1, axis=1) != IDS)]
    by_token[-1] = by_token[-1].at[0].set(False)
    state, y = jax.lax.scan(step, starts.repeated(start, 2), tuple(by_token))
    return y.swapaxes(0, 1), state


@pytest.fixture
def float64():
    """In the interpreter's own threads, too; compiled quickly, for each program runs once."""
    options = ("jax_enable_x64", "jax_disable_most_optimizations")
    before = {option: jax.config.values[option] for option in options}
    for option in options:
        jax.config.update(option, True)
    yield
    for option in options:
        jax.config.update(option, before[option])


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize("op", NAMES)
def test_values_and_gradients_are_those_of_the_recurrence_in_float64(float64, op, impl, dtype):
    """Of the start and of all else, wherever documents begin; one is a single token."""
    exact = {"wkv6": wkv6_loop, "ssd": ssd_loop}[op]
    with devices.simulated("interpret"):
        assert_accurate(with_kernel(op, impl), exact, inputs_of(op, dtype), NAMES[op], dtype)


def small_with(kind):
    return small_model(kind, layers=1, learned_states=True)


def read(small, tokens, state=None, **options):
    return small.apply({"params": small.params}, tokens, state, **options)


def assert_same_read(one, other):
    same = lambda a, b: assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    jax.tree.map(same, one, other)


@pytest.mark.parametrize("kind", ["rwkv6", "mamba2"])
def test_every_document_is_read_as_if_it_were_alone(kind):
    """Packed, from the first state, and in a row that the last document leaves a state in."""
    small = small_with(kind)
    tokens, ids = random_tokens(2, 7), jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2)
    packed, alone = read(small, tokens, segment_ids=ids), read(small, tokens[:, 3:])
    assert_same_read(packed.logits[:, 3:], alone.logits)
    assert_same_read(packed.state, alone.state)
    first = first_state(small.model.config, small.params, small.model.init_state(2))
    assert_same_read(read(small, tokens[:, 3:], first), alone)
    begins = jnp.array([True, False])
    begun = start_documents(small.model.config, small.params, packed.state, begins)
    one, other = (jax.tree.map(lambda x, row=row: x[row], begun) for row in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(lambda x: x[0], first))
    jax.tree.map(np.testing.assert_array_equal, other, jax.tree.map(lambda x: x[1], packed.state))


def test_scores_and_generated_text_begin_with_it():
    small = small_with("rwkv6")
    tokens = np.asarray(random_tokens(1, 9)[0])
    logits = read(small, tokens[None]).logits[0]
    exact = jax.nn.log_softmax(logits[:-1])[np.arange(8), tokens[1:]]
    pairs = [(tokens[:1], tokens[1:]), (tokens[:1], tokens[1:4])]  # the second one is padded
    long, short = score(small.model, small.params, pairs)
    assert_allclose(long.log_probs, exact, atol=2e-4)
    assert_allclose(short.log_probs, exact[:3], atol=2e-4)
    context = start_prefill(small.model, small.params, tokens)
    first = first_state(small.model.config, small.params, small.model.init_state(1))
    jax.tree.map(np.testing.assert_array_equal, context.state, first)
    zeroed = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "state" in path[-1].key else x, small.params
    )
    without = small.apply({"params": zeroed}, tokens[None]).logits[0]
    assert np.abs(without - logits).max() > 1e-2


def test_each_branch_has_its_own():
    small = small_with("mamba+mamba")
    [block] = first_state(small.model.config, small.params, small.model.init_state(2))
    for branch, name in ((block.rwkv, "mamba"), (block.mamba, "mamba_2")):
        learned = small.params["blocks_0"][name]["init_states"]
        np.testing.assert_array_equal(branch.ssm, jnp.stack([learned] * 2))


def test_zero_states_give_the_bits_of_a_model_without():
    plain, learned = small_model("rwkv6", layers=1), small_with("rwkv6")
    tokens, ids = random_tokens(2, 7), jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2)
    block = plain.params["blocks_0"]
    zeros = jnp.zeros_like(learned.params["blocks_0"]["rwkv"]["time_state"])
    block = block | {"rwkv": block["rwkv"] | {"time_state": zeros}}
    one = read(plain, tokens, segment_ids=ids)
    other = learned.apply({"params": plain.params | {"blocks_0": block}}, tokens, segment_ids=ids)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"architecture": "gpt2"}, "not official gpt2; leave both unset"),
        ({"branch": "legacy"}, "not legacy hybrid; leave both unset"),
        ({"rwkv_carry": 0.5}, "model.rwkv_carry=0.5 also says what a document begins with"),
        ({"mamba_reset": 0.5}, "model.mamba_reset=0.5 also says what a document begins with"),
    ],
)
def test_what_has_no_learned_states_says_so(fields, message):
    with pytest.raises(InputError, match=message):
        small_config(learned_states=True, **fields)
