import json

import numpy as np
import pytest

from gt_jax.config import (
    check_devices,
    default_config,
    flatten,
    from_config_dict,
    from_stored,
    to_dict,
)
from gt_jax.config_files import folder, load_config
from gt_jax.errors import InputError

CONFIGS = sorted(path.stem for path in folder().glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid_and_survives_json(name):
    config = from_config_dict(load_config(name))
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim.lr", -1.0, "optim.lr=-1.0 must be above 0"),
        ("optim.lr", float("nan"), "optim.lr=nan must be a finite number"),
        ("optim.lr", 1e39, "optim.lr=1e+39 must lie between 1.2e-38 and 3.4e+38"),
        ("optim.eps", 1e-46, "optim.eps=1e-46 must lie between 1.2e-38 and 3.4e+38"),
        ("optim.b2", 1.0, "optim.b2=1.0 must be from 0 to below 1"),
        ("optim.lr_multipliers.mamba", -0.5, "optim.lr_multipliers.mamba=-0.5 must be 0 or more"),
        ("train.seq_len", 1, "train.seq_len=1 must be at least 2"),
        ("train.steps", 0, "train.steps=0 must be at least 1"),
        ("train.steps", 10**20, f"train.steps={10**20} must be at most 2147483647"),
        ("checkpoint.every", 2**31, "checkpoint.every=2147483648 must be at most 2147483647"),
        ("checkpoint.keep", 0, "checkpoint.keep=0 must be at least 1"),
        (
            "checkpoint.keep_every",
            300,
            "keep_every=300 must be a multiple of checkpoint.every",
        ),
        ("optim.name", "adam", "optim.name='adam' must be one of adamw, muon, schedule_free; did"),
        ("optim.decay_steps", 10, "optim.decay_steps=10 is of optim.schedule=wsd; set that, or"),
        ("optim.name", "schedule_free", "so optim.schedule=cosine must be constant"),
        ("optim.ema", 1.0, "optim.ema=1.0 must be from 0 to below 1"),
        ("data.order", "track", "must be one of windows, tracks; did you mean 'tracks'?"),
        ("parallel.mode", "xmap", "parallel.mode='xmap' must be one of jit, pmap; did you mean"),
        ("train.carry_state", True, "train.carry_state=True needs text that continues"),
        ("optim.grad_accumulation", 3, "must be a multiple of optim.grad_accumulation=3"),
        ("train.batch_size", 2**31 - 1, "tokens a step, more than 2,147,483,647; lower one"),
    ],
)
def test_impossible_value_is_refused_with_its_field_value_and_fix(field, value, message):
    config = default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as caught:
        from_config_dict(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("ema", 0.9), ("b1", 0.0)])
def test_schedule_free_has_an_average_of_its_own_and_needs_its_share(make_config, field, value):
    fields = {"optim.name": "schedule_free", "optim.schedule": "constant"}
    make_config(**fields)
    with pytest.raises(InputError, match=rf"schedule_free .*optim\.{field}={value}"):
        make_config(**fields, **{f"optim.{field}": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["optim"].update(lrr=1.0), 'optim.lrr is not a config field; did you mean'),
        (lambda c: c.update(optm={}), "optm is not a config field; did you mean 'optim'?"),
        (lambda c: c["train"].update(steps=1.5), "train.steps=1.5 must be a whole number, not f"),
        (lambda c: c["train"].update(carry_state=1), "train.carry_state=1 must be true or false"),
        (lambda c: c["model"].update(dim="64"), "model.dim='64' must be a whole number, not str"),
        (lambda c: c.update(optim=3), "optim=3 must be a group of fields"),
        (lambda c: c["data"].pop("order"), "data.order is missing"),
    ],
)  # fmt: skip
def test_wrong_shape_is_refused_with_its_field(change, message):
    config = default_config().to_dict()
    change(config)
    with pytest.raises(InputError) as caught:
        from_config_dict(config)
    assert message in str(caught.value)


def test_numbers_of_numpy_become_those_of_python():
    plain = default_config().to_dict()
    config = default_config().to_dict()
    config["train"]["steps"] = np.int64(plain["train"]["steps"])
    config["optim"]["lr"] = np.float32(0.5)
    config["log"]["tensorboard"] = np.bool_(True)
    plain["optim"]["lr"] = 0.5
    assert json.loads(json.dumps(to_dict(from_config_dict(config)))) == plain


def test_whole_number_serves_as_float():
    config = default_config().to_dict()
    config["optim"]["lr"] = 1
    assert from_config_dict(config).optim.lr == 1.0


def test_batch_must_divide_over_devices(make_config):
    check_devices(make_config(**{"optim.grad_accumulation": 2}), 4)
    with pytest.raises(InputError, match=r"train\.batch_size=8 must be a multiple of 3 devices"):
        check_devices(make_config(), 3)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"parallel.sequence": 3}, 4, r"parallel\.sequence=3 must divide .* devices, 4$"),
        ({"parallel.fsdp": 3}, 4, r"^parallel\.fsdp=3 times .* must divide .* devices, 4$"),
        ({"parallel.fsdp": 2, "parallel.mode": "pmap"}, 4, r"parallel\.mode=pmap spreads rows"),
        ({"parallel.sequence": 2}, 32, r"train\.batch_size=8 must be .* of 16 groups"),
        ({"parallel.sequence": 2, "parallel.mode": "pmap"}, 4, r"parallel\.mode=pmap spreads rows"),
        ({"parallel.sequence": 2, "train.seq_len": 9}, 4, r"train\.seq_len=9 must be a multiple"),
        ({"parallel.sequence": 4, "train.seq_len": 8}, 4, r"at least 4 times as much$"),
    ],
)
def test_rows_must_divide_over_the_devices_that_share_them(make_config, changes, devices, message):
    with pytest.raises(InputError, match=message):
        check_devices(make_config(**changes), devices)


def test_flatten_names_nested_fields():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_a_run_stored_by_an_earlier_version_has_moved_fields_and_defaults_for_new_ones():
    stored = to_dict(from_config_dict(default_config()))
    del stored["train"]["rwkv_dropout_start"], stored["train"]["rwkv_dropout_end"]
    stored["model"] |= {"rwkv_dropout_start": 0.4, "rwkv_dropout_end": 0.1}
    config = from_stored(stored)
    assert (config.train.rwkv_dropout_start, config.train.rwkv_dropout_end) == (0.4, 0.1)
    assert from_stored(to_dict(config)) == config
