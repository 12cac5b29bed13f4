"""Cross-entropy in one pass: right in the interpreter, lowered for every kind of GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels.elementwise import softmax_loss
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.pallas.architectures import lowered_for
from gt_jax.models import cross_entropy
from tests.kernels.hopper_kernels import too_old

pytestmark = too_old

N, D, V = 6, 8, 1024


def exact(logits, targets):
    """In float64: nats and gradients where targets count, zeros elsewhere."""
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares = powers / powers.sum(axis=-1, keepdims=True)
    onehot = np.arange(logits.shape[-1]) == np.asarray(targets)[..., None]
    counted = np.asarray(targets) >= 0
    of_target = np.where(counted, np.sum(shares, axis=-1, where=onehot), 1)
    return -np.log(of_target), np.where(counted[..., None], shares - onehot, 0)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    logits = 5 * rng.standard_normal((2, N, V))
    logits[:, 1] += 1e4  # overflows without its maximum
    targets = rng.integers(V, size=(2, N))
    targets[:, 2], targets[:, 3], targets[:, 4] = -1, 0, V - 1
    return jnp.asarray(logits, jnp.float32), jnp.asarray(targets)


def test_nats_and_gradients_are_right_and_so_are_those_of_several_models(case):
    with devices.simulated("interpret"):
        nats, gradients = jax.jit(jax.vmap(softmax_loss.nats_and_gradients))(*case)
        alone = jax.jit(softmax_loss.nats_and_gradients)(case[0][1], case[1][1])
    expected_nats, expected = exact(*case)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-6, atol=2e-6)
    assert gradients.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradients, np.float64), expected, rtol=2**-8, atol=1e-12)
    np.testing.assert_array_equal(nats[1], alone[0])
    np.testing.assert_array_equal(gradients[1], alone[1])


def test_target_outside_the_vocabulary_is_nan_and_of_a_masked_token_nothing_counts(case):
    logits, targets = case[0][0].at[2].set(jnp.nan), case[1][0].at[5].set(V)
    with devices.simulated("interpret"):
        nats, gradients = jax.jit(softmax_loss.nats_and_gradients)(logits, targets)
    assert np.isnan(nats[5]) and nats[2] == 0 and np.isfinite(np.delete(nats, 5)).all()
    assert not gradients[2].any()
    with devices.simulated("interpret"):
        nats, _ = jax.jit(softmax_loss.nats_and_gradients)(logits, targets.at[2].set(0))
    assert np.isnan(nats[2])


def test_loss_of_a_head_takes_the_kernel_and_has_the_same_gradients(case, monkeypatch):
    """In several chunks, the last of them not full."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", 4 * V)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((N, D)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
    of = jax.value_and_grad(cross_entropy.head_cross_entropy, (0, 1))
    plain = jax.jit(of, static_argnums=3)(x, head, case[1][0], False)
    with devices.simulated("interpret"):
        fused = jax.jit(of, static_argnums=3)(x, head, case[1][0], True)
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-6)
    for found, wanted in zip(fused[1], plain[1]):
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(found - wanted) < 2**-9 * np.linalg.norm(wanted)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("vocabulary", [512, 16384])
def test_kernel_lowers_for(capability, vocabulary):
    arrays = [
        jax.ShapeDtypeStruct((64, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((64,), jnp.int32),
    ]
    with devices.simulated("lower"), lowered_for(capability):
        traced = jax.jit(softmax_loss.nats_and_gradients).trace(*arrays)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_the_kernel_does_not_take_is_named():
    with devices.simulated("lower"):
        assert softmax_loss.unsupported(16384, "bfloat16") is None
        assert "gradients in bfloat16" in str(softmax_loss.unsupported(512, "float32"))
        for vocabulary in (65, 16384 + 512):
            reason = "multiples of 512 up to 16384"
            assert reason in str(softmax_loss.unsupported(vocabulary, "bfloat16"))
