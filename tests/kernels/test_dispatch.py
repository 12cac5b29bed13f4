"""Which implementation runs: the order, the reasons, and what a person is told."""

import importlib
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.kernels import choose_impl, dispatch
from gt_jax.kernels.dispatch import IMPLEMENTATIONS, Implementation
from gt_jax.kernels.pallas import devices
from gt_jax.kernels.segments import resets
from tests.kernels.accuracy import assert_accurate
from tests.kernels.hopper_kernels import SSD, WKV6, too_old

each_kernel = pytest.mark.parametrize("kernel", (WKV6, SSD), ids=lambda kernel: kernel.name)


def function_of(op, name):
    return getattr(importlib.import_module(IMPLEMENTATIONS[op][name].module), f"{op}_{name}")


@each_kernel
def test_implementations_take_the_same_arguments(kernel):
    taken = {}
    for name in IMPLEMENTATIONS[kernel.name]:
        parameters = inspect.signature(function_of(kernel.name, name)).parameters.values()
        taken[name] = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert len(set(map(tuple, taken.values()))) == 1, taken


@each_kernel
def test_every_implementation_that_runs_here_is_the_definition(kernel):
    """A new one, too; kernels of GPUs that are not here are interpreted in other files."""
    inputs = kernel.make(length=70, dtype="bfloat16")
    for name, implementation in IMPLEMENTATIONS[kernel.name].items():
        if name != "reference" and implementation.unsupported() is None:
            call, definition = kernel.public(name), kernel.public("reference")
            assert_accurate(call, definition, inputs, kernel.arguments, "bfloat16")


@too_old
@each_kernel
def test_on_a_hopper_gpu_the_reason_names_every_dtype_the_kernel_takes(kernel):
    with devices.simulated("lower"):
        name, reason = choose_impl(kernel.name)
        assert name == "mosaic"
        assert reason.endswith("; other calls take portable or chunked")
        for dtype in kernel.dtypes["mosaic"]:
            assert dtype in reason
            inputs = kernel.make(length=8, dtype=dtype)
            outputs = jax.eval_shape(kernel.call("mosaic"), *inputs)  # and does take it
            assert outputs[0].dtype == dtype


@too_old
@pytest.mark.parametrize(
    "op, sizes", [("wkv6", "K and V up to 64"), ("ssd", "P=64 and N=64 or 128")]
)
def test_on_a_hopper_gpu_the_reason_names_sizes(op, sizes):
    with devices.simulated("lower"):
        assert f"bfloat16 or float32, {sizes};" in choose_impl(op)[1]


@too_old
@each_kernel
def test_on_another_new_gpu_the_reason_names_what_portable_takes(kernel, monkeypatch):
    portable = IMPLEMENTATIONS[kernel.name]["portable"]
    unsupported = portable._replace(unsupported=lambda: None)
    monkeypatch.setitem(IMPLEMENTATIONS[kernel.name], "portable", unsupported)
    if not devices.hopper_unsupported():
        pytest.skip("this is a Hopper GPU")
    name, reason = choose_impl(kernel.name)
    assert name == "portable"
    assert "bfloat16, " in reason and reason.endswith("; other calls take chunked")


@pytest.mark.parametrize(
    "capability, hopper, portable",
    [("7.5", False, False), ("8.0", False, True), ("9.0", True, True), ("12.0", False, True)],
)
def test_each_gpu_runs_the_kernels_that_its_capability_allows(
    monkeypatch, capability, hopper, portable
):
    device = SimpleNamespace(platform="gpu", device_kind="Some GPU", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(devices, "OLDEST_JAX", (0, 1))
    found = devices.hopper_unsupported(), devices.portable_unsupported()
    for reason, runs in zip(found, (hopper, portable)):
        assert (reason is None) == runs
        assert runs or f"this is Some GPU ({capability}) under JAX" in reason


@each_kernel
def test_elsewhere_the_reason_names_the_device(kernel):
    if not devices.portable_unsupported():
        pytest.skip("the Pallas kernels run on this GPU")
    device = jax.devices()[0].device_kind
    assert choose_impl(kernel.name) == ("chunked", f"matmuls over chunks, on {device}")


def test_an_unknown_operation_is_named():
    with pytest.raises(ValueError, match="op='wkv7' must be one of 'wkv6', 'ssd'"):
        choose_impl("wkv7")


@pytest.fixture
def registry(monkeypatch):
    """make(first=error or None, ...) puts an operation "op" of implementations in place."""

    def make(**errors):
        functions = {}
        for name, error in errors.items():

            def run(x, name=name, error=error):
                if error is not None:
                    raise error
                return name, x

            functions[f"op_{name}"] = run
        module = type("Module", (), {key: staticmethod(f) for key, f in functions.items()})
        monkeypatch.setattr(dispatch.importlib, "import_module", {"module": module}.__getitem__)
        known = {name: Implementation("module", "what it is") for name in errors}
        monkeypatch.setitem(IMPLEMENTATIONS, "op", known)

    return make


def test_auto_takes_the_first_that_takes_the_call(registry):
    registry(first=NotImplementedError("no"), second=None, third=None)
    assert dispatch.dispatch("op", "auto", 3) == ("second", 3)


def test_auto_passes_on_no_other_error(registry):
    registry(first=NotImplementedError("no"), second=ZeroDivisionError("yes"), third=None)
    with pytest.raises(ZeroDivisionError, match="yes"):
        dispatch.dispatch("op", "auto", 3)


def test_an_implementation_asked_for_by_name_says_why_it_cannot_run(registry):
    registry(first=NotImplementedError("too large"), second=None)
    with pytest.raises(ValueError, match="op: impl='first' cannot run here: too large"):
        dispatch.dispatch("op", "first", 3)
    with pytest.raises(ValueError, match="op: impl='third' must be one of 'auto', 'first', 'sec"):
        dispatch.dispatch("op", "third", 3)


def test_auto_says_when_nothing_takes_the_call(registry):
    registry(first=NotImplementedError("no"))
    with pytest.raises(ValueError, match="op: no implementation takes these arguments"):
        dispatch.dispatch("op", "auto", 3)


def test_what_can_run_nothing_here_is_not_loaded(registry, monkeypatch):
    registry(first=None, second=None)
    nowhere = Implementation("no module", "what it is", lambda: "the wrong device")
    monkeypatch.setitem(IMPLEMENTATIONS["op"], "first", nowhere)
    assert dispatch.dispatch("op", "auto", 3) == ("second", 3)
    with pytest.raises(ValueError, match="cannot run here: the wrong device"):
        dispatch.dispatch("op", "first", 3)


def test_resets_are_where_the_id_changes_and_never_at_the_first_token():
    ids = jnp.asarray([[7, 7, 8, 8, 7], [0, 1, 2, 2, 2]])
    expected = [[False, False, True, False, True], [False, True, True, False, False]]
    np.testing.assert_array_equal(resets(ids), expected)
    np.testing.assert_array_equal(resets(None, (2, 3)), np.zeros((2, 3), bool))
