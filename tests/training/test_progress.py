import jax.numpy as jnp
import pytest

from gt_jax.errors import InputError
from gt_jax.training.progress import FiniteWatch, Progress


@pytest.mark.parametrize("first", [float("nan"), float("inf")])
def test_evaluation_that_is_not_finite_is_never_the_best(make_config, first):
    progress, config = Progress(), make_config(**{"train.patience": 2, "train.eval_every": 1})
    assert not progress.update(1, first)
    assert progress.best_step is None and not progress.stops_early(config)
    assert progress.update(2, 3.0) and progress.update(3, 2.0)
    assert not progress.update(4, first) and not progress.update(5, 2.5)
    assert (progress.best_loss, progress.best_step, progress.evaluated) == (2.0, 3, 5)
    assert progress.stops_early(config)


def test_older_checkpoint_with_nan_as_its_best_is_cured():
    old = {"best_loss": float("nan"), "best_step": 5, "last_loss": 3.0}
    progress = Progress.of_checkpoint({"progress": old | {"evaluations_since_best": 1}}, step=10)
    assert progress.best_step is None and progress.evaluated == 10
    assert progress.update(15, 2.9) and progress.best_step == 15


def test_steps_that_are_not_finite_end_a_run_at_most_two_steps_late(make_config):
    """Looked at after every step, whatever log.every says."""
    watch = FiniteWatch(make_config(**{"train.max_nonfinite": 10, "log.every": 100}))
    counts = [0, 1, 2, 0, *range(1, 100)]
    seen = 0
    with pytest.raises(InputError, match="the last 10 steps were not finite"):
        for seen in range(len(counts)):
            watch.add(jnp.asarray(counts[seen], jnp.int32))
    assert counts[seen] in (10, 11, 12)


def test_last_steps_are_looked_at_before_a_save(make_config):
    watch = FiniteWatch(make_config(**{"train.max_nonfinite": 1}))

    class Late:
        """A count that is still being computed."""

        copy_to_host_async = lambda self: None
        is_ready = lambda self: False
        __int__ = lambda self: 1

    watch.add(Late())
    with pytest.raises(InputError, match=r"train\.max_nonfinite=1\); lower optim\.lr=0\.001"):
        watch.finish()
