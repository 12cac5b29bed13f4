"""What config.json of another library may say: every setting is honoured, refused or unknown.

A setting is of one of four kinds. `wanted` ones change the mathematics and must be as in our
models. `sizes` must be those of the tensors. `free` ones are honoured elsewhere, or no logit
depends on them. Any other is unknown: it might change logits, so the model is refused, unless it
is null, which means unset everywhere.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from gt_jax.errors import InputError, did_you_mean, one_line
from gt_jax.models import ModelConfig


class Settings(NamedTuple):
    """The settings of one layout's config.json.

    Attributes:
        model_types: what model_type may say; it may also be absent.
        architectures: the same for each entry of architectures.
        wanted: setting -> the value that our models have.
        defaults: setting -> what the library takes where config.json is silent, if not `wanted`.
        sizes: ModelConfig -> {setting: its value for these tensors}. None in config.json means
            that the library derives the size.
        layers: the setting that counts blocks, which config.json must have.
        free: settings that change no logit.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    wanted: dict[str, Any]
    defaults: dict[str, Any]
    sizes: Callable
    layers: str
    free: frozenset[str]


# transformers' PretrainedConfig has these for every model, and older versions the defaults of
# generation as well. None reaches the forward pass of a model here.
_OF_EVERY_MODEL = """
    architectures auto_map model_type transformers_version torch_dtype dtype use_cache
    output_attentions output_hidden_states return_dict torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward is_decoder id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix initializer_range max_position_embeddings
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences output_scores return_dict_in_generate remove_invalid_values
    exponential_decay_length_penalty _name_or_path _commit_hash _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal
    _output_attentions _flash_attn_2_enabled
"""
OF_EVERY_MODEL = frozenset(_OF_EVERY_MODEL.split())
# The same, of those that would change a model.
NEUTRAL = {
    "quantization_config": None,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
}


def check(config: Mapping[str, Any], settings: Settings) -> None:
    """Raise InputError for settings of another model than ours; sizes are left to `check_sizes`."""
    _check_kind(config, settings)
    check_values(config, settings.wanted | NEUTRAL, settings.defaults)
    if config.get(settings.layers) is None:
        raise InputError(
            f"config.json: {settings.layers} is missing; without it nobody can tell whether blocks "
            "are missing too"
        )


def check_sizes(
    config: Mapping[str, Any], settings: Settings, model_config: ModelConfig
) -> list[str]:
    """Compare config.json with a model made from the tensors.

    Returns:
        The unknown settings that are null, for a warning.

    Raises:
        InputError: a size is not that of the tensors, or a setting is unknown.
    """
    sizes = settings.sizes(model_config)
    for name, size in sizes.items():
        found = config.get(name)
        fitting = size if isinstance(size, tuple) else (size,)
        if found is not None and found not in fitting:
            raise InputError(
                f"config.json: {name}={shown(found)}, but its tensors have "
                f"{' or '.join(map(str, fitting))}"
            )
    known = set(sizes) | set(settings.wanted) | set(NEUTRAL) | settings.free | OF_EVERY_MODEL
    return check_known(config, known)


def check_values(
    config: Mapping[str, Any],
    wanted: dict,
    defaults: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> None:
    """Raise InputError unless every setting that changes the mathematics is as ours.

    Args:
        config: from config.json.
        wanted: setting -> the value that our models have.
        defaults: setting -> what it is where config is silent, if not the wanted value.
        prefix: stands before the name in messages.
    """
    if not isinstance(config, dict):
        raise InputError(f"config.json: {prefix.rstrip('.')} must be an object")
    for name, value in wanted.items():
        found = config.get(name, (defaults or {}).get(name, value))
        if found != value:
            raise InputError(f"config.json: {prefix}{name}={shown(found)} must be {value!r} here")


def check_known(config: Mapping[str, Any], known: Collection[str], prefix: str = "") -> list[str]:
    """The settings outside `known` that are null; InputError if another has a value."""
    unknown = [name for name in config if name not in known]
    for name in unknown:
        if config[name] is not None:
            raise InputError(
                f"config.json: {prefix}{one_line(name, 60)}={shown(config[name])} is unknown and "
                f"may change what the model computes{did_you_mean(name[:60], known)}; remove it "
                "from config.json if it does not"
            )
    return [prefix + one_line(name, 60) for name in unknown]


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A setting that is true or false; InputError if it is anything else."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"config.json: {name}={shown(value)} must be true or false")
    return value


def check_ids(config: Mapping[str, Any], vocab_size: int, file: str = "config.json") -> None:
    """Raise InputError if a special token's id is none of the model's.

    Args:
        config: settings, of which those named *_token_id hold an id, ids or null.
        vocab_size: ids are 0 to vocab_size - 1.
        file: where they come from, for messages.
    """
    for name, value in config.items():
        if not name.endswith(("_token_id", "_token_ids")):
            continue
        for number in value if isinstance(value, list) else [value]:
            whole = isinstance(number, int) and not isinstance(number, bool)
            if number is not None and not (whole and 0 <= number < vocab_size):
                raise InputError(
                    f"{file}: {one_line(name, 60)}={shown(value)} is no id of this model: ids are "
                    f"0 to {vocab_size - 1}; set it to the right one, or to null"
                )


def shown(value: object) -> str:
    """A setting's value as messages quote it."""
    return one_line(repr(value), 80)


def _check_kind(config, settings):
    """Raise InputError if model_type or architectures name another model."""
    model_type = config.get("model_type")
    if model_type is not None and model_type not in settings.model_types:
        raise InputError(
            f"config.json: model_type={shown(model_type)} must be "
            f"{' or '.join(map(repr, settings.model_types))} for these tensors"
        )
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(name in settings.architectures for name in names)
    ):
        raise InputError(
            f"config.json: architectures={shown(names)} must be a list of "
            f"{' or '.join(map(repr, settings.architectures))} for these tensors"
        )
