"""Each auxiliary loss is its formula, enters the gradient exactly, and pulls where it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.data import Batch
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model
from gt_jax.training import debate
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step

VOCAB, T = 11, 7
ALL = {f"debate.{name}_weight": 0.1 * (i + 1) for i, name in enumerate(debate.NAMES)}
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def small(**fields):
    shape = {"vocab_size": VOCAB, "dim": 32, "layers": 2, "heads": 2, "state_size": 8}
    return make_model(ModelConfig(**shape | {"impl": "reference"} | fields))


@pytest.fixture(scope="module")
def model():
    return small(residual="mamba", post_norm=True)


@pytest.fixture(scope="module")
def batch():
    """Eight rows with different numbers of counted targets."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, VOCAB, (2, 8, T), dtype=np.int32)
    targets[rng.random((8, T)) < 0.3] = -1
    targets[3, 2:] = -1
    return Batch(inputs, targets, None, np.ones(8, bool))


@pytest.fixture(scope="module")
def params(model, batch):
    """Away from their initialisation, where RWKV says nothing and gates are constant."""
    params = fast(model.init)(jax.random.key(0), batch.inputs)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype("f"), params)


@pytest.fixture(scope="module")
def recorded(model, params, batch):
    """Activations as float64 NumPy arrays, by block, and the final norm and head with them."""
    sown = fast(lambda p: model.apply({"params": p}, batch.inputs, mutable=["activations"])[1])(
        params
    )
    return sown


def float64(recorded):
    """By block; r and m are what the fusion reads, with the input that the model adds to Mamba."""
    for block in recorded["activations"].values():
        arrays = {
            name: np.asarray(value[0], np.float64)
            for name, value in (block | block["fusion"]).items()
            if name != "fusion"
        }
        yield arrays | {"r": arrays["rwkv_out"], "m": arrays["block_input"] + arrays["mamba_out"]}


def found(model, make_config, params, recorded, batch, **fields):
    config = make_config(**{f"debate.{name}": value for name, value in fields.items()})
    terms = debate.make_terms(model, config)
    return fast(lambda p, s: terms(p, s, batch.targets))(params, recorded)


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def binary(q, w):
    return -q * np.log(w) - (1 - q) * np.log(1 - w)


def nats_alone(params, x, targets):
    """[B, T] cross-entropy of a residual stream that is decoded as it is."""
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    x = x * np.asarray(params["final_norm"]["scale"], np.float64)
    logits = x @ np.asarray(params["embedding"]["embedding"], np.float64).T
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]


def test_terms_are_their_formulas(model, make_config, params, recorded, batch):
    """All of the repaired forms, against float64."""
    counted = batch.targets >= 0
    expected = dict.fromkeys(debate.NAMES, 0.0)
    for layer, block in enumerate(float64(recorded)):
        r, m, w = block["r"], block["m"], block["gate"][..., 0]
        scale = np.asarray(params[f"blocks_{layer}"]["fused_norm"]["scale"], np.float64)
        added = lambda x, scale=scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-2) * scale
        of_r = nats_alone(params, block["block_stream"] + added(r), batch.targets)
        of_m = nats_alone(params, block["block_stream"] + added(m), batch.targets)
        R, M = ((w[..., None] * r) ** 2).sum(-1), (((1 - w[..., None]) * m) ** 2).sum(-1)
        share = np.array([(R / (R + M))[i][counted[i]].mean() for i in range(8)])
        expected["diversity"] += cosine(r, block["mamba_out"]) ** 2 / 2
        expected["arbiter"] += binary(1 / (1 + np.exp((of_r - of_m) / 0.5)), w) / 2
        expected["branch"] += (of_r + of_m) / 2 / 2
        expected["entropy"] += (1 - binary(w, w) / np.log(2)) / 2
        expected["balance"] += ((share - 0.5) ** 2)[:, None] * np.ones((1, T))
    weights = dict.fromkeys((f"{name}_weight" for name in debate.NAMES), 1.0)
    options = {"blocks": "all", "arbiter_temperature": 0.5}
    sums = found(model, make_config, params, recorded, batch, **weights, **options)
    assert set(sums) == set(debate.NAMES)
    for name, value in sums.items():
        np.testing.assert_allclose(value, expected[name][counted].sum(), rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("target", ["mix", "final"])
def test_published_terms_are_their_formulas(model, make_config, params, recorded, batch, target):
    counted = batch.targets >= 0
    blocks = list(float64(recorded))
    r, m, w = (np.mean([b[n] for b in blocks], 0) for n in ("r", "m", "gate"))
    tau = w * r + (1 - w) * m if target == "mix" else blocks[-1]["block_out"]
    nearer = ((r - tau) ** 2).mean(-1) < ((m - tau) ** 2).mean(-1)
    gates = [b["gate"][..., 0] for b in blocks]
    expected = {
        "diversity": (1 + cosine(r, m)) / 2,
        "arbiter": binary(nearer.astype(float), w[..., 0]),
        "entropy": np.mean([binary(g, g) for g in gates], 0),
    }
    forms = {"diversity": "published", "arbiter_target": target, "entropy": "published"}
    weights = {f"{name}_weight": 1.0 for name in expected}
    sums = found(model, make_config, params, recorded, batch, **weights, **forms)
    for name, value in sums.items():
        np.testing.assert_allclose(value, expected[name][counted].sum(), rtol=2e-4, err_msg=name)


def build(model, make_config, batch, params, **fields):
    config = make_config(**{"train.seq_len": T, "optim.clip": 0.0} | fields)
    rate = make_schedule(config.optim, config.train.steps)
    tx = make_optimizer(config.optim, rate)
    state = fast(functools.partial(init_state, model, tx, config))(jax.random.key(0))
    step = fast(make_train_step(model, tx, rate, config))
    return step(state.replace(params=params), batch)


@pytest.fixture(scope="module")
def whole(model, make_config, batch, params):
    return build(model, make_config, batch, params, **ALL)


def test_gradient_is_that_of_the_whole_batchs_means(model, make_config, batch, params, whole):
    """Of an objective written here, without microbatches; the task's loss is reported apart."""
    terms, counted = debate.make_terms(model, make_config(**ALL)), (batch.targets >= 0).sum()

    def objective(params):
        output, sown = model.apply({"params": params}, batch.inputs, mutable=["activations"])
        log_p = jax.nn.log_softmax(output.logits)
        chosen = jnp.take_along_axis(log_p, jnp.maximum(batch.targets, 0)[..., None], -1)[..., 0]
        task = -jnp.sum(chosen, where=batch.targets >= 0)
        sums = terms(params, sown, batch.targets)
        extra = sum(ALL[f"debate.{n}_weight"] * s for n, s in sums.items())
        return (task + extra) / counted, task / counted

    (value, task), grads = fast(jax.value_and_grad(objective, has_aux=True))(params)
    np.testing.assert_allclose(whole[1]["loss"], task, rtol=1e-5)
    np.testing.assert_allclose(whole[1]["objective"], value, rtol=1e-5)
    extra = sum(ALL[f"debate.{n}_weight"] * whole[1][f"debate_{n}"] for n in debate.NAMES)
    np.testing.assert_allclose(value - task, extra, rtol=1e-4)
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(whole[1]["grad_norm"], norm, rtol=1e-4)


def test_microbatches_and_remat_keep_the_gradient(make_config, batch, params, whole):
    accumulated = ALL | {"optim.grad_accumulation": 4}
    state, metrics = build(
        small(residual="mamba", post_norm=True, remat="full"),
        make_config,
        batch,
        params,
        **accumulated,
    )
    for name, value in whole[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    # AdamW's moments: a tenth of the gradient, a twentieth of its square.
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(whole[0].opt_state)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_repaired_forms_avoid_what_the_published_ones_reward():
    """Anti-parallel branches, a weight that follows itself, and one branch with all the weight."""
    rng = np.random.default_rng(2)
    r = jnp.asarray(rng.standard_normal((1, 64, 32)), jnp.float32)
    across = jnp.asarray(rng.standard_normal((1, 64, 32)), jnp.float32)
    across -= r * (jnp.sum(r * across, -1) / jnp.sum(r * r, -1))[..., None]

    def of(form, m, w=0.6):
        w = jnp.full((1, 64), w)
        block = debate._Branches(r, r, r, m, r, m, w)
        settings = debate.Debate(diversity=form, entropy=form, arbiter_target="mix")
        return {
            "diversity": debate._diversity(settings, [block]).mean(),
            "entropy": debate._entropy(settings, [block]).mean(),
            "arbiter": debate._arbiter(settings, [block], {}).mean(),
        }

    published = {m: of("published", x) for m, x in (("anti", -r), ("across", across))}
    assert published["anti"]["diversity"] < published["across"]["diversity"] - 0.4
    repaired = {m: of("orthogonal", x) for m, x in (("anti", -r), ("across", across))}
    assert repaired["across"]["diversity"] < 1e-6 < 0.9 < repaired["anti"]["diversity"]
    assert of("published", across, 0.99)["entropy"] < of("published", across, 0.5)["entropy"]
    assert of("mixing", across, 0.99)["entropy"] > of("mixing", across, 0.5)["entropy"]
    # The mix is nearest to the heavier branch, whichever that is: more of the same costs less.
    for w in (0.6, 0.4):
        further = 0.9 if w > 0.5 else 0.1
        assert of("published", across, further)["arbiter"] < of("published", across, w)["arbiter"]


def test_arbiter_follows_the_better_branch_and_not_the_heavier(make_config):
    """q is 73 % for a branch that is one nat better, whatever it weighs now."""
    block = debate._Branches(*[jnp.zeros((1, 1, 4))] * 6, jnp.full((1, 1), 0.1))
    settings = make_config(**{"debate.arbiter_weight": 1.0}).debate
    nats = {0: (jnp.full((1, 1), 2.0), jnp.full((1, 1), 3.0))}
    pull = jax.grad(lambda w: debate._arbiter(settings, [block._replace(w=w)], nats).sum())
    assert pull(jnp.full((1, 1), 0.1))[0, 0] < 0 < pull(jnp.full((1, 1), 0.9))[0, 0]
    np.testing.assert_allclose(pull(jnp.full((1, 1), 0.7310586)), 0, atol=1e-5)


def test_weights_of_exactly_one_and_zero_are_finite():
    """XLA folds constants: 1 - w + 1e-8 is no safe logarithm."""
    value = fast(jax.value_and_grad(lambda w: debate._cross_entropy(w, w).sum()))
    for w in (0.0, 1.0):
        assert all(np.isfinite(x).all() for x in value(jnp.full((1, 1), w)))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "fade"}, [1, 1, 0.5, 0]),
        ({"schedule": "fade", "fade_from": 0.0, "fade_to": 1.0}, [1, 0.7, 0.5, 0.1]),
        ({"schedule": "fade", "fade_from": 0.5, "fade_to": 0.5}, [1, 1, 0, 0]),
        ({"schedule": "exponential"}, np.exp([0, -0.9, -1.5, -2.7])),
    ],
)
def test_schedules(make_config, fields, expected):
    settings = make_config(**{f"debate.{name}": value for name, value in fields.items()}).debate
    scales = [float(debate.schedule(settings, step, 100)) for step in (0, 30, 50, 90)]
    np.testing.assert_allclose(scales, expected, atol=1e-6)


def test_tokens_alone_are_decoded_in_chunks_alike(monkeypatch):
    rng = np.random.default_rng(3)
    x, head = rng.standard_normal((10, 4)), rng.standard_normal((4, 5))
    targets = np.array([0, 4, -1, 2, 2, 1, 3, -1, 0, 1])
    nats = lambda: debate.token_nats(
        jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(targets)
    )
    log_p = x @ head - np.log(np.exp(x @ head).sum(-1, keepdims=True))
    expected = np.where(targets >= 0, -log_p[np.arange(10), targets], 0)
    np.testing.assert_allclose(nats(), expected, atol=1e-5)
    monkeypatch.setattr(debate, "_CHUNK", 15)
    np.testing.assert_allclose(nats(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model_fields", "fields", "message"),
    [
        ({"architecture": "rwkv6"}, {"branch_weight": 1.0}, "debate.branch_weight needs model.arc"),
        ({"fusion": "cp"}, {"arbiter_weight": 1.0}, "debate.arbiter_weight needs a fusion that"),
        ({"fusion": "ws"}, {"entropy_weight": 1.0}, "model.fusion='ws' does not"),
        ({}, {"branch_weight": 1.0, "blocks": "2"}, "debate.blocks='2' must be last, all or numb"),
        ({}, {"branch_weight": 1.0, "blocks": "first"}, "numbers between 0 and 1 with commas"),
    ],
)
def test_what_a_model_does_not_have_is_refused(make_config, model_fields, fields, message):
    config = make_config(**{f"debate.{name}": value for name, value in fields.items()})
    with pytest.raises(InputError, match="debate") as caught:
        debate.make_terms(small(**model_fields), config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"debate.arbiter_weight": -1.0}, "debate.arbiter_weight=-1.0 must be 0 or more"),
        ({"debate.fade_from": 0.9}, "debate.fade_from=0.9 must be at most debate.fade_to=0.66"),
        ({"debate.entropy": "mix"}, "debate.entropy='mix' must be one of mixing, published"),
        ({"train.stop_rules": "gap,gaps"}, "train.stop_rules=gap,gaps must be empty, or of gap"),
    ],
)
def test_impossible_settings_are_refused(make_config, fields, message):
    with pytest.raises(InputError) as caught:
        make_config(**fields)
    assert message in str(caught.value)


def test_nothing_is_computed_while_every_weight_is_zero(model, make_config):
    assert debate.make_terms(model, make_config(**{"debate.blocks": "nonsense"})) is None
