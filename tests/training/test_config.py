import importlib
import json
from pathlib import Path

import pytest

from configs import base
from gt_jax.config import check_devices, flatten, from_config_dict, to_dict
from gt_jax.errors import InputError

CONFIGS = sorted(p.stem for p in Path(base.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid_and_survives_json(name):
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim.lr", -1.0, "optim.lr=-1.0 must be above 0"),
        ("optim.lr", float("nan"), "optim.lr=nan must be a finite number"),
        ("optim.b2", 1.0, "optim.b2=1.0 must be from 0 to below 1"),
        ("optim.lr_multipliers.mamba", -0.5, "optim.lr_multipliers.mamba=-0.5 must be 0 or more"),
        ("train.seq_len", 1, "train.seq_len=1 must be at least 2"),
        ("train.steps", 0, "train.steps=0 must be at least 1"),
        ("checkpoint.keep", 0, "checkpoint.keep=0 must be at least 1"),
        ("data.order", "track", "must be one of windows, tracks; did you mean 'tracks'?"),
        ("parallel.mode", "xmap", "parallel.mode='xmap' must be one of jit, pmap; did you mean"),
        ("train.carry_state", True, "train.carry_state=True needs text that continues"),
        ("optim.grad_accumulation", 3, "must be a multiple of optim.grad_accumulation=3"),
    ],
)
def test_impossible_value_is_refused_with_its_field_value_and_mend(field, value, message):
    config = base.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as caught:
        from_config_dict(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["optim"].update(lrr=1.0), 'optim.lrr is not a config field; did you mean'),
        (lambda c: c.update(optm={}), "optm is not a config field; did you mean 'optim'?"),
        (lambda c: c["train"].update(steps=1.5), "train.steps=1.5 must be int, not float"),
        (lambda c: c["train"].update(carry_state=1), "train.carry_state=1 must be bool, not int"),
        (lambda c: c["model"].update(dim="64"), "model.dim='64' must be int or None, not str"),
        (lambda c: c.update(optim=3), "optim=3 must be a group of fields"),
        (lambda c: c["data"].pop("order"), "data.order is missing"),
    ],
)  # fmt: skip
def test_wrong_shape_is_refused_with_its_field(change, message):
    config = base.get_config().to_dict()
    change(config)
    with pytest.raises(InputError) as caught:
        from_config_dict(config)
    assert message in str(caught.value)


def test_whole_number_serves_as_float():
    config = base.get_config().to_dict()
    config["optim"]["lr"] = 1
    assert from_config_dict(config).optim.lr == 1.0


def test_batch_must_divide_over_devices(make_config):
    check_devices(make_config(**{"optim.grad_accumulation": 2}), 4)
    with pytest.raises(InputError, match=r"train\.batch_size=8 must be a multiple of 3 devices"):
        check_devices(make_config(), 3)


def test_flatten_names_nested_fields():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
