"""Tokens spread over devices: the recurrences compute what one device computes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels import context_parallel, ssd
from gt_jax.kernels.pallas import devices, launch, splits
from tests.kernels.accuracy import (
    TOLERANCE,
    random_cotangents,
    relative_rms,
    values_and_gradients,
)
from tests.kernels.context_parallel_cases import (
    copied,
    kernel_errors,
    over_devices,
    segments_over_devices,
    tokens,
)
from tests.kernels.hopper_kernels import SSD, WKV6, each_kernel_and_dtype, too_old


def errors_of(op, impl):
    """Case -> errors by name of the array, of four simulated devices."""
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.context_parallel_cases", op, impl],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", ["wkv6", "ssd"])
def test_devices_that_share_a_sequence_equal_the_definition(op):
    """Outputs, final state and every gradient, within the tolerance of one device."""
    found = errors_of(op, "plain")
    assert len(found) >= 6
    for case, errors in found.items():
        assert_within_tolerance(errors, case.split()[1], case)


@too_old
@pytest.mark.parametrize("op", ["wkv6", "ssd"])
def test_interpreted_portable_kernels_of_devices_equal_the_definition(op):
    ((case, errors),) = errors_of(op, "portable").items()
    assert_within_tolerance(errors, "bfloat16", case)


def assert_within_tolerance(errors, dtype, case):
    limit = TOLERANCE[dtype]
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= limit}
    assert not wrong, f"{case}: beyond {limit:.0e}: {wrong}"


@too_old
@pytest.mark.parametrize(
    "kernel, dtype, multiprocessors",
    [
        pytest.param(WKV6, "bfloat16", 4, id="wkv6-bfloat16-in-splits"),
        pytest.param(SSD, "float32", 1, id="ssd-float32"),
    ],
)
def test_interpreted_hopper_kernels_of_devices_equal_the_definition(
    float64_in_every_thread, monkeypatch, kernel, dtype, multiprocessors
):
    """The interpreter runs one device at a time: the exchange is replaced by what it computes."""
    monkeypatch.setattr(splits, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(launch, "MULTIPROCESSORS", multiprocessors)
    count, length = 2, 70  # devices and their tokens
    passed_on = {False: 0, True: 0}  # by reverse: the state or gradient at a device's border

    def receive(decay, added, state, axis_name, *, reverse=False):
        received = state + passed_on[reverse]
        passed_on[reverse] = decay * received + added
        return received

    monkeypatch.setattr(context_parallel, "receive_state", receive)
    inputs = kernel.per_token(kernel.make(batch=2, length=count * length, heads=1, dtype=dtype))
    resets = jnp.zeros((2, count * length), bool).at[0, (length, length + 20)].set(True)
    reference = kernel.run("reference", resets)
    cotangents = random_cotangents(reference, inputs)

    def of_device(n, name, z):
        if name == "initial_state":
            return z if n == 0 else 0 * z
        return z if name in ("u", "D") else z[:, n * length : (n + 1) * length]

    @jax.jit  # one program: the interpreter can hang while others are started
    def values_and_gradients_of_devices(inputs, cotangents):
        pull_backs, outputs, gradients = [], [], []
        for n in range(count):
            some = [of_device(n, name, z) for name, z in zip(kernel.arguments, inputs)]
            run = kernel.run("mosaic", of_device(n, "resets", resets), axis_name="sequence")
            (output, state), pull_back = jax.vjp(run, *some)
            outputs.append(output)
            pull_backs.append(pull_back)
        for n in reversed(range(count)):
            of_output = of_device(n, "output", cotangents[0]).astype(output.dtype)
            of_state = cotangents[1] * (n == count - 1)
            gradients.insert(0, pull_backs[n]((of_output, of_state.astype(state.dtype))))
        return outputs, state, gradients

    with devices.simulated("interpret"):
        outputs, state, gradients = values_and_gradients_of_devices(inputs, cotangents)
    exact = [jnp.asarray(z, jnp.float64) for z in inputs]
    expected = jax.tree.leaves(values_and_gradients(reference, tuple(exact), cotangents))
    found = {"output": jnp.concatenate(outputs, axis=1), "final_state": state}
    for name, of_devices in zip(kernel.arguments, zip(*gradients)):
        if name == "initial_state":
            found[name] = of_devices[0]
        elif name in ("u", "D"):
            found[name] = sum(of_devices)
        else:
            found[name] = jnp.concatenate(of_devices, axis=1)
    errors = {name: relative_rms(z, e) for (name, z), e in zip(found.items(), expected)}
    assert_within_tolerance(errors, dtype, kernel.name)


@too_old
def test_layers_in_a_scan_exchange_states_once_forward_and_once_backward():
    """Although jax.checkpoint repeats the layers: what the kernels computed is kept."""
    inputs = SSD.make(length=64, heads=1)
    keep = jax.checkpoint_policies.save_only_these_names("recurrence")

    def loss(*arrays):
        def layer(x, _):
            return ssd(x, *arrays[1:5], impl="mosaic", axis_name="sequence")[0], None

        layer = jax.checkpoint(layer, policy=keep)
        return jnp.sum(jax.lax.scan(layer, arrays[0], None, length=2)[0].astype(jnp.float32))

    whole = (*SSD.of_heads, "initial_state")
    specs = tuple(copied if name in whole else tokens for name in SSD.arguments)
    gradients = over_devices(
        lambda *arrays: jax.grad(loss, range(5))(*arrays[:-1]), specs, None, 1, specs[:5]
    )
    with devices.simulated("lower"):
        lowered = jax.jit(gradients).trace(*inputs).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count('"stablehlo.all_gather"') == 2 * 2  # decay and update


@pytest.mark.gpu
@each_kernel_and_dtype
@pytest.mark.parametrize("length, heads", [(2048, 2), (150, 8)])  # in splits; not
def test_gpus_that_share_a_sequence_equal_the_definition(
    needs_gpu, kernel, impl, dtype, length, heads
):
    count = min(4, jax.device_count())
    ids = segments_over_devices(length)[:, : count * length]
    shape = {"batch": 2, "length": count * length, "heads": heads, "dtype": dtype}
    errors = kernel_errors(kernel, impl, count, ids, **shape | kernel.released)
    assert_within_tolerance(errors, dtype, f"{kernel.name} on {count} GPUs")


@pytest.mark.parametrize("length", [1, 63, 65, 4100])
def test_sums_of_later_tokens_and_their_gradient(length):
    x, weight = np.random.default_rng(0).random((2, 2, length, 3), np.float32)
    sums, pull_back = jax.vjp(context_parallel._sums_after, jnp.asarray(x))
    later = np.cumsum(x[:, ::-1].astype(np.float64), axis=1)[:, ::-1] - x
    np.testing.assert_allclose(sums, later, rtol=1e-5, atol=1e-5)
    before = np.cumsum(weight.astype(np.float64), axis=1) - weight
    np.testing.assert_allclose(pull_back(jnp.asarray(weight))[0], before, rtol=1e-5, atol=1e-5)


def test_a_gpu_sums_later_tokens_by_products_alone():
    x = jax.ShapeDtypeStruct((1, 4096, 3), jnp.float32)
    sums = lambda x: jnp.sum(context_parallel._sums_after(x) ** 2)
    lowered = jax.jit(jax.grad(sums)).trace(x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "dot_general" in text and "reduce_window" not in text and "chlo.scan" not in text
