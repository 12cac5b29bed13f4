"""Weights in and out: models of other libraries as ours, and ours as theirs."""

import importlib.util
import json
from pathlib import Path

from gt_jax import checkpoint
from gt_jax.convert import card, files, foreign, mamba2, modeling, rwkv6, settings
from gt_jax.convert.layout import read_params, write_arrays
from gt_jax.convert.tokenizer_files import tokenizer_files
from gt_jax.data import tokenizer_from_dict
from gt_jax.data.base import Tokenizer
from gt_jax.data.pretrained import WORLD_FILE, export_files, export_ids, read_tokenizer
from gt_jax.errors import InputError, one_line
from gt_jax.models import ModelConfig

LAYOUTS = rwkv6.LAYOUTS | mamba2.LAYOUTS | modeling.LAYOUTS
OWN_TOKENIZER = "tokenizer_gt_jax.json"  # as our own checkpoints hold it
TOKENIZER_FILES = (OWN_TOKENIZER, "tokenizer.json", WORLD_FILE, "vocab.txt")


def import_model(
    source: str | Path, target: str | Path, *, tokenizer: str | Path | None = None
) -> str:
    """Write a model that another library stored as a folder for `gt_jax.load`.

    Args:
        source: a file of weights, or a folder of config.json and weights.
        target: folder to make.
        tokenizer: a tokenizer.json, an RWKV vocabulary file, or "ids" for none; None takes what
            lies beside the weights, else for RWKV's 65536 ids the World vocabulary if the rwkv
            package is installed, else none.

    Returns:
        A line that says what was imported, and one more for each setting that was left out.

    Raises:
        InputError: the source is damaged or of another model than ours can be. Nothing is written.
    """
    files.check_free(target)
    found = files.read(source)
    try:
        name, config, unset = _recognise(found)
        params = read_params(LAYOUTS[name], config, found.tensors)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    chosen = _find_tokenizer(tokenizer, found.folder, config)
    with files.new(target) as unfinished:
        checkpoint.save_model(unfinished, config, params, chosen)
    return "\n".join(
        [
            f"{_describe(config)}, read as {name} with tokenizer {chosen.kind}: {target}",
            *(
                f"warning: config.json: {setting}=null is unknown and was left out"
                for setting in unset
            ),
        ]
    )


def _recognise(found: files.Source) -> tuple[str, ModelConfig, list[str]]:
    """The name of a source's layout, its ModelConfig, and its unknown settings, all of them null.

    Raises:
        InputError: the source is another model, or config.json and the tensors do not agree.
    """
    foreign.refuse(found.tensors, found.config)
    name = _find_layout(found.tensors)
    if LAYOUTS[name].weights and not found.config:
        raise InputError("config.json belongs to these weights; give the folder of both")
    config = ModelConfig(**LAYOUTS[name].fields(found.tensors, found.config))
    if not found.config:
        return name, config, []
    settings.check_ids(found.config, config.vocab_size)
    generation = found.folder / "generation_config.json"
    if generation.exists():
        settings.check_ids(files.read_json(generation), config.vocab_size, generation.name)
    return name, config, settings.check_sizes(found.config, LAYOUTS[name].settings, config)


def export_model(
    source: str | Path, target: str | Path, *, layout: str | None, licence: str | None = None
) -> str:
    """Write one of our models as another library stores it; a folder with its tokenizer.

    Args:
        source: what `gt_jax.load` takes.
        target: file or folder to make, whichever the layout uses.
        layout: a key of LAYOUTS; None for the only one that can hold the model.
        licence: of the weights, for the model card of layout "pytorch"; None if unsaid.

    Returns:
        A line that says what was exported, after one that says which checkpoint of a run it was.

    Raises:
        InputError: no such layout, or it cannot hold this model. Nothing is written.
    """
    target = Path(target)
    files.check_free(target)
    notes = []
    model, params, tokenizer = checkpoint.load(source, say=notes.append)
    config = model.config
    fitting = [name for name, other in LAYOUTS.items() if _fits(other, config)]
    if layout is None and len(fitting) == 1:
        layout = fitting[0]
    if layout not in fitting:
        fix = f"must be {' or '.join(fitting)}"
        raise InputError(f"--format={layout} for {_describe(config)} {fix}")
    weights = LAYOUTS[layout].weights
    if weights is None and target.suffix not in (".pth", ".safetensors"):
        raise InputError(f"{target} must end in .pth or .safetensors for --format={layout}")
    if (weights or target.name).endswith(".safetensors"):
        files.import_safetensors()
    texts = tokenizer_files(tokenizer)
    # A kind of our own in the form of transformers; read back it would be another kind.
    is_ours = "tokenizer.json" in texts.keys() - export_files(tokenizer).keys()
    own = {OWN_TOKENIZER: json.dumps(tokenizer.to_dict()) + "\n"}
    if layout == "pytorch":
        texts |= own | _files_of_pytorch(source, config, tokenizer, licence, list(texts))
    elif is_ours:
        texts |= own
    arrays = write_arrays(LAYOUTS[layout], config, params)
    with files.new(target) as unfinished:
        if weights is None:
            files.write(unfinished, arrays)
        else:
            to_config = LAYOUTS[layout].config
            assert to_config is not None, f"{layout} is a folder and so has a config.json"
            theirs = to_config(config)
            if "model_type" in theirs:  # read by transformers
                theirs |= export_ids(tokenizer)
            files.write_folder(unfinished, weights, arrays, theirs)
            for name, text in texts.items():
                (unfinished / name).write_text(text, "utf-8")
    return "\n".join([*notes, f"{_describe(config)}, written as {layout}: {target}"])


def _files_of_pytorch(source, config, tokenizer, licence, others: list[str]) -> dict[str, str]:
    """Name -> text of what layout "pytorch" has besides weights, config.json and `others`."""
    code = [modeling.FILE, *(name for name in others if name.endswith(".py"))]
    has_tokenizer = "tokenizer_config.json" in others
    return {
        modeling.FILE: modeling.modeling_file(config, card.describe(config)),
        "README.md": card.model_card(
            source, config, tokenizer, licence=licence, has_tokenizer=has_tokenizer, code=code
        ),
    }


def _find_layout(tensors):
    """The key of LAYOUTS whose names these are."""
    for name, layout in LAYOUTS.items():
        if layout.mark in tensors:
            return name
    marks = ", ".join(layout.mark for layout in LAYOUTS.values())
    first = f"its first tensor is {next(iter(tensors))}" if tensors else "it holds no tensor"
    raise InputError(f"no RWKV-6 or Mamba-2 language model: {first}; one of {marks} is needed")


def _fits(layout, config):
    """Whether a layout can hold a model of ours."""
    if config.learned_states and not layout.states:
        return False
    if layout.architecture is None:
        return True
    if config.architecture != layout.architecture or config.segment_token is not None:
        return False
    if config.architecture == "mamba2":
        return not config.mamba_feed_forward
    return config.branch == "official" and config.feed_forward


def _own_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that an export of ours brought along."""
    try:
        return tokenizer_from_dict(files.read_json(path))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # of damaged content
        raise InputError(
            f"{path} is no tokenizer ({one_line(error)}); --tokenizer=ids does without"
        ) from error


def _describe(config):
    branch = ", legacy branch" if config.branch == "legacy" else ""
    without = "" if config.feed_forward else ", without feed-forward,"
    if config.architecture == "mamba2":
        without = ", with a feed-forward," if config.mamba_feed_forward else ""
    if config.segment_token is not None:
        without += " with segment embeddings,"
    if config.learned_states:
        without += " with learned states,"
    return (
        f"{config.architecture}{branch}{without} of {config.layers} blocks, dim {config.dim}, "
        f"vocabulary {config.vocab_size:,}"
    )


def _find_tokenizer(wanted, folder: Path, config):
    """As `import_model` says of its argument."""
    beside = [folder / name for name in TOKENIZER_FILES]
    path = Path(wanted) if wanted else next((p for p in beside if p.is_file()), None)
    if path is None and (config.architecture, config.vocab_size) == ("rwkv6", 65536):
        package = importlib.util.find_spec("rwkv")
        if package is not None and package.origin is not None:
            path = Path(package.origin).parent / WORLD_FILE
    if wanted == "ids":
        path = None
    if path is not None and path.name == OWN_TOKENIZER:
        tokenizer = _own_tokenizer(path)
    else:
        tokenizer = read_tokenizer(path, folder, config.vocab_size)
    largest = tokenizer.vocab_size - 1
    if largest >= config.vocab_size:
        token = settings.shown(tokenizer.token_text(largest))
        raise InputError(
            f"{path} has {tokenizer.vocab_size} ids and the model {config.vocab_size}: its {token} "
            f"is {largest}; give the model's own with --tokenizer=FILE, or do without "
            "with --tokenizer=ids"
        )
    return tokenizer
