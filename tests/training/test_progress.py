import pytest

from gt_jax.training.progress import Progress


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
