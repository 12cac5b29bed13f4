"""From a run's config to its model."""

import dataclasses

from gt_jax.config import Config, computation_dtype
from gt_jax.errors import InputError, did_you_mean
from gt_jax.kernels.pallas.devices import hopper_unsupported, portable_unsupported
from gt_jax.models import FUSIONS, ModelConfig, make_config


def make_model_config(config: Config, vocab_size: int, stored: dict | None = None) -> ModelConfig:
    """The ModelConfig of a run.

    Args:
        config: uses the model group and train.carry_state.
        vocab_size: number of token ids.
        stored: what `checkpoint.read_about` says of model.init_from, if that is set.

    Raises:
        InputError: an impossible value, or one that differs from the stored model.
    """
    fields = dataclasses.asdict(config.model)
    fusion = config.model.fusion
    if fusion not in (None, *FUSIONS):  # also where the preset has no use for it
        raise InputError(
            f"model.fusion={fusion!r} must be one of {', '.join(FUSIONS)}"
            + did_you_mean(fusion, FUSIONS)
        )
    preset, init_from = fields.pop("preset"), fields.pop("init_from")
    fields["dtype"] = computation_dtype(config.model.dtype)
    if init_from:
        of_run = {name: fields.pop(name) for name in ("dtype", "impl", "remat")}
        assert stored is not None, "model.init_from is set, so its checkpoint has been read"
        its = ModelConfig(**stored["model"])
        if config.train.tune == "state" or fields["learned_states"]:
            its = dataclasses.replace(its, learned_states=True)
        for name, value in fields.items():
            if value not in (None, getattr(its, name)):
                raise InputError(
                    f"model.{name}={value} differs from {getattr(its, name)} in {init_from}, "
                    "which sets the architecture: leave it unset"
                )
        model_config = dataclasses.replace(its, **of_run)
        preset = model_config.architecture
    else:
        model_config = make_config(preset, vocab_size=vocab_size, **fields)
    if config.train.carry_state and model_config.position_limit is not None:
        raise InputError(
            f"train.carry_state=True needs a recurrent model, and model.preset={preset} attends "
            f"over at most {model_config.position_limit} tokens; set train.carry_state=False"
        )
    return model_config


def takes_kernels(config: ModelConfig) -> bool:
    """Whether Pallas kernels compute the recurrences on this machine, for sizes that they take."""
    recurrent = config.position_limit is None
    wanted = config.impl in ("auto", "mosaic", "portable")
    # Of other dtypes, Hopper's alone are.
    unsupported = portable_unsupported if config.dtype == "bfloat16" else hopper_unsupported
    return recurrent and wanted and unsupported() is None
