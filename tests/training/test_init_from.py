"""A run that continues from a stored model: its weights, architecture and tokenizer."""

import shutil

import jax
import numpy as np
import pytest

import gt_jax
from gt_jax import checkpoint
from gt_jax.config import default_config, from_config_dict
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, make_model
from gt_jax.train import train


@pytest.fixture
def stored(tmp_path):
    """A model whose alphabet the text below does not have in full."""
    tokenizer = CharTokenizer("abcdef")
    config = ModelConfig(tokenizer.vocab_size, "mamba2", dim=32, layers=1, state_size=8)
    params = jax.jit(make_model(config).init)(jax.random.key(5), np.zeros((1, 1), int))["params"]
    checkpoint.save_model(tmp_path / "stored", config, params, tokenizer)
    return tmp_path / "stored"


def config_of(stored, **changes):
    config = default_config()
    (stored.parent / "text.txt").write_text("abccabbca" * 60)
    small = {
        "model.init_from": str(stored),
        "data.source": str(stored.parent / "text.txt"),
        "optim.lr": 1e-30,
        "train.steps": 2,
        "train.batch_size": 2,
        "train.seq_len": 8,
        "train.sample_tokens": 0,
        "log.tensorboard": False,
    }
    config.update_from_flattened_dict(small | changes)
    return from_config_dict(config)


def test_run_begins_with_the_stored_model_and_resumes_without_it(
    stored, tmp_path, capsys, no_curve, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "400")  # pytest's workers have 80
    train(config_of(stored), tmp_path / "run")
    assert f"mamba2 from {stored}" in capsys.readouterr().out
    (model, before, tokenizer), (_, after, its) = map(gt_jax.load, (stored, tmp_path / "run"))
    assert its.to_dict() == tokenizer.to_dict()
    jax.tree.map(np.testing.assert_array_equal, before, after)

    shutil.rmtree(stored)
    train(config_of(stored, **{"train.steps": 3}), tmp_path / "run")
    assert "resuming at step 2" in capsys.readouterr().out
    assert gt_jax.load(tmp_path / "run")[0].config == model.config


def test_architecture_cannot_be_changed(stored, tmp_path):
    with pytest.raises(InputError, match=r"model.dim=64 differs from 32 in .*leave it unset"):
        train(config_of(stored, **{"model.dim": 64}), tmp_path / "run")
    with pytest.raises(InputError, match="nowhere holds no checkpoint"):
        train(config_of(stored, **{"model.init_from": "nowhere"}), tmp_path / "run")
