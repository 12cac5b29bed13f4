"""Training waits briefly for a thread that computes in Python beside it."""

import sys

import pytest

from gt_jax.training import backend


@pytest.mark.parametrize("given, expected", [(0.005, backend._TURN), (1e-5, 1e-5)])
def test_turns_of_threads_are_short_and_never_longer_than_they_were(given, expected):
    before = sys.getswitchinterval()
    sys.setswitchinterval(given)
    try:
        backend.prepare()
        assert sys.getswitchinterval() == pytest.approx(expected, abs=1e-6)
    finally:
        sys.setswitchinterval(before)
