"""Ablations of a branch do what their names say, and so do shares and norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import lab
from experiments.lab import ablation, results
from experiments.questions import paradox
from gt_jax.analysis import ablated_losses, ablations, output_means
from gt_jax.data.batches import Batch
from gt_jax.models import make_config, make_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order
KERNELS = {"official": ("output", "out_proj"), "legacy": ("ffn_value", "out_proj")}
jit = lab.jit(compile_fast=True)


@pytest.fixture(scope="module", params=("official", "legacy"))
def small(request):
    """A model with constant gates of 0.3, random outputs of both branches, and some text."""
    c = make_config(
        "gf-mh",
        vocab_size=11,
        dim=32,
        layers=2,
        heads=1,
        state_size=8,
        branch=request.param,
        impl="reference",
    )
    model = make_model(c)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (2, 3, 9), dtype=np.int32)
    params = jax.device_get(jit(model.init)(jax.random.key(0), tokens[0])["params"])
    for block in ("blocks_0", "blocks_1"):
        for branch, kernel in zip(("rwkv", "mamba"), KERNELS[c.branch]):
            leaf = params[block][branch][kernel]["kernel"]
            params[block][branch][kernel]["kernel"] = rng.normal(0, 0.1, leaf.shape)
    batches = Batch(tokens[..., :-1], tokens[..., 1:], None, np.ones((2, 3), bool))
    return model, params, batches


@pytest.fixture(scope="module")
def found(small):
    model, params, batches = small
    return jax.device_get(jit(functools.partial(ablation.contributions, model))(params, batches))


@pytest.fixture(scope="module")
def loss_of(small):
    """Parameters -> their loss on the text."""
    model, _, batches = small
    targets = batches.targets.reshape(6, -1)

    def loss(params):
        logits = model.apply({"params": params}, batches.inputs.reshape(6, -1)).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return jit(loss)


@pytest.fixture(scope="module")
def ablated(small, found):
    """Name -> loss with what every ablation leaves; None -> that with nothing left."""
    model, params, batches = small
    names, keep, fill = ablation.every_ablation(model.config, found["mean"])
    keep = np.concatenate([keep, 0 * keep[:1]])
    fill = np.concatenate([fill, 0 * fill[:1]])
    losses = jit(functools.partial(ablation.losses, model))(params, batches, keep, fill)
    return dict(zip([*names, None], jax.device_get(losses), strict=True))


def zeroed(params, *places):
    """Parameters with the last kernel of some (block, branch) at zero."""
    params = jax.tree.map(np.copy, params)
    for block, branch, kernel in places:
        params[block][branch][kernel]["kernel"] *= 0
    return params


def test_ablations_are_as_if_branches_gave_nothing(small, ablated, loss_of):
    """A gate that ignores the branches keeps its value when they give zeros."""
    model, params, _ = small
    c = model.config
    wanted = [("nothing", "zero", "all"), ("Mamba", "zero", "block 1"), ("Mamba", "mean", "all")]
    lost = [ablated[name] for name in (*wanted, None)]

    np.testing.assert_allclose(lost[0], loss_of(params), **CLOSE)
    without = zeroed(params, ("blocks_1", "mamba", "out_proj"))
    np.testing.assert_allclose(lost[1], loss_of(without), **CLOSE)
    assert len({float(loss) for loss in lost}) == 4
    assert (("RWKV and its input", "zero", "all") in ablated) == (c.branch == "legacy")
    # The legacy branch gives its input even so.
    if c.branch == "official":
        blocks = ("blocks_0", "blocks_1")
        places = [(b, *p) for b in blocks for p in (("rwkv", "output"), ("mamba", "out_proj"))]
        without = zeroed(params, *places)
        np.testing.assert_allclose(lost[3], loss_of(without), **CLOSE)


def test_figures_before_the_fusion_are_the_old_ones_where_the_gate_does_not_answer(small, ablated):
    """A constant gate cannot: what a gated sum loses without a part is what it loses without it."""
    model, params, batches = small
    means = jax.device_get(jit(functools.partial(output_means, model))(params, batches))
    names, keep, fill = ablations(model.config, means)
    losses = jit(functools.partial(ablated_losses, model))(params, batches, keep, fill)
    new = dict(zip(names, jax.device_get(losses)))
    assert len(new) == 13
    for name, loss in new.items():
        np.testing.assert_allclose(loss, ablated[name], **CLOSE, err_msg=str(name))


def test_contributions(small, found):
    model, params, batches = small
    np.testing.assert_allclose(found["gate"], 0.3, **CLOSE)
    np.testing.assert_allclose(found["gate_square"], 0.09, **CLOSE)
    apply = jit(functools.partial(model.apply, mutable=["activations"]))
    _, sown = apply({"params": params}, batches.inputs.reshape(6, -1))
    for layer in range(2):
        block = sown["activations"][f"blocks_{layer}"]
        rwkv, mamba, fused = (block[n][0] for n in ("rwkv_out", "mamba_out", "fused"))
        norm = lambda x: jnp.linalg.norm(x, axis=-1)
        share = jnp.mean(0.3 * norm(rwkv) / (0.3 * norm(rwkv) + 0.7 * norm(mamba)))
        np.testing.assert_allclose(found["share_with_input"][layer], share, **CLOSE)
        np.testing.assert_allclose(found["mean"][layer].sum(0), fused.mean((0, 1)), **CLOSE)
        same = np.allclose(found["share"][layer], share)
        assert same == (model.config.branch == "official")


@pytest.mark.parametrize("small", ["official"], indirect=True)  # whose branch does not matter
def test_gradient_norms(small):
    model, params, batches = small
    config = lab.make_config({"optim.clip": 1e9})
    norms = jit(functools.partial(paradox.gradient_norms, model, config))(params, batches)
    last = jax.tree.map(lambda x: x[1:], batches)

    def loss(params):
        logits = model.apply({"params": params}, last.inputs[0]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, last.targets[0]).mean()

    grads = jit(jax.grad(loss))(params)
    for name in ("rwkv", "mamba"):
        leaves = jax.tree.leaves([grads[f"blocks_{layer}"][name] for layer in range(2)])
        rms = jnp.sqrt(jnp.mean(jnp.square(jnp.concatenate([leaf.ravel() for leaf in leaves]))))
        np.testing.assert_allclose(norms["gradient"][name], rms, rtol=1e-4)
        assert 0.1 < norms["update"][name] < 1.5  # Adam's updates are of order one


def test_experiment_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paradox, "VARIANTS", {"official": paradox.VARIANTS["official"]})
    text, out = tmp_path / "text.txt", tmp_path / "paradox.json"
    text.write_text("to be or not to be that is the question\n" * 100)
    flags = ["--quick", "--seeds=2", "--impl=reference"]
    paradox.main([*flags, f"--source={text}", f"--out={out}"])
    result = results.read(out)
    measures = result["measures"]
    assert out.with_suffix(".png").exists()
    for name in ("Mamba share, trained", "loss added without Mamba"):
        assert measures[name]["n"] == 2
    shares = {row[1]: row[4]["mean"] for row in result["tables"][1]["rows"]}
    assert shares["untrained"] == 0  # RWKV-6 begins with a zero projection
    assert measures["Mamba share, trained"]["mean"] == pytest.approx(1 - shares["trained"])
    assert measures["Mamba share, published"]["mean"] < 0.2
