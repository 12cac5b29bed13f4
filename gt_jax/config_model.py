"""The model group of a run's settings: a preset, and ModelConfig's fields to change in it."""

import dataclasses
import typing

from gt_jax.models import ModelConfig
from gt_jax.settings import setting


def _model_fields() -> list[tuple]:
    """A preset, and the fields of ModelConfig to change: None means "as the preset says"."""
    fields = [
        ("preset", str, setting("gf-mh", "`python -m gt_jax.models` lists them all")),
        (
            "init_from",
            str | None,
            setting(
                None,
                "a model to continue from, as gt_jax.load takes it: the run has its weights,"
                " architecture and tokenizer, whatever preset and data.tokenizer say",
            ),
        ),
    ]
    kinds = typing.get_type_hints(ModelConfig)
    for field in dataclasses.fields(ModelConfig):
        about, choices = field.metadata["about"], field.metadata["choices"]
        within = field.metadata["within"]
        if field.name == "dtype":
            default, about = "auto", about + "; auto: bfloat16 on GPU and TPU, float32 on CPU"
            choices = ("auto", *choices)
        elif field.name in ("impl", "remat"):
            default = field.default
        elif field.name in ("vocab_size", "architecture"):  # from the tokenizer and the preset
            continue
        else:
            default = None
        kind = kinds[field.name] if default is not None else kinds[field.name] | None
        fields.append((field.name, kind, setting(default, about, within, choices=choices)))
    return fields


_ModelFields = dataclasses.make_dataclass("_ModelFields", _model_fields(), frozen=True)


class Model(_ModelFields):
    """model.*: a preset, changes to it, and how to compute it."""
