"""Batches arrive as the loader gives them, in order, whole and with its position."""

import itertools

import jax
import numpy as np
import pytest

from gt_jax.data import make_batches
from gt_jax.training import parallel
from gt_jax.training.prefetch import prefetch


def batches(order):
    documents = [np.arange(start, start + 300, dtype=np.int32) for start in (0, 1000)]
    return make_batches(documents, order=order, batch_size=2, seq_len=8, seed=3)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("order", ["windows", "tracks"])
def test_batches_on_a_device_are_those_of_the_loader(mode, order):
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    loader = batches(order)
    sent = prefetch(batches(order), mesh, mode)
    for batch, position in itertools.islice(sent, 40):  # more than are sent at once
        expected = next(loader)
        assert position == loader.state()
        for x, y in zip(expected, batch, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)


def test_a_lone_device_is_sent_one_array_of_each_kind_for_many_steps(monkeypatch):
    sent = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *args: (sent.append(args), put(*args))[1])
    feed = prefetch(batches("windows"), parallel.make_mesh(devices=jax.devices()[:1]), "jit")
    assert len(sent) == 1  # before a step asks for one
    for _ in range(16):
        batch, _ = next(feed)
    assert len(sent) == 1
    assert batch.inputs.sharding == jax.sharding.SingleDeviceSharding(jax.devices()[0])
