"""Every model of ours as a folder with its own PyTorch file, for transformers and for torch alone.

The file, modeling_gt_jax.py, holds the definitions of gt_jax/convert/pytorch that one model uses,
word for word but for the names of its block, mixers, fusion and norms.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from gt_jax.convert import settings
from gt_jax.convert.layout import Layout, Rule, count_blocks, keep, shape_of, transpose
from gt_jax.convert.rwkv6 import rank_fields, ranks
from gt_jax.convert.settings import Settings
from gt_jax.convert.tensor import Tensor
from gt_jax.errors import InputError
from gt_jax.models import FUSIONS, ModelConfig, make_model
from gt_jax.models.gates import BRANCH_EPSILON
from gt_jax.models.rwkv6 import hidden_dim

FILE = "modeling_gt_jax.py"
# In this order; a definition may use those of every other part.
PARTS = (
    *("layers", "rwkv6", "mamba2", "legacy", "fusions", "hybrid"),
    *("language_model", "attention", "causal_lm"),
)
BLOCKS = {
    "hybrid": "HybridBlock",
    "rwkv6": "RWKV6Block",
    "mamba2": "Mamba2Block",
    "gpt2": "AttentionBlock",
    "gpt1": "AttentionBlock",
}
HEADER = '''"""A language model from gt_jax in plain PyTorch, for prompts and for token after token.

{about}.

Alone, with torch and safetensors:

    model = load("FOLDER")
    logits, state = model(torch.tensor([[1, 2, 3]]))  # a prompt
    logits, state = model(torch.tensor([[4]]), state)  # one more token, at the same cost for ever

With transformers:

    model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)

Shapes: B batch, T time, D model width, H heads, K/V channels of an RWKV head, P channels of a
Mamba-2 head, N its state size, C tokens in a chunk, R a low rank. Recurrences, norms and the
residual stream are float32 whatever the dtype of the weights. MIT licence.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.utils.generic import ModelOutput
except ImportError:  # load() needs none of them

    class GenerationMixin: ...

    class PretrainedConfig: ...

    class PreTrainedModel: ...

    class ModelOutput: ...
'''


def modeling_file(config: ModelConfig, about: str) -> str:
    """The text of modeling_gt_jax.py for one model.

    Args:
        config: of the model.
        about: the model in a few words.

    Raises:
        InputError: the fusion, or another choice, has no PyTorch form.
    """
    _check_fields(config)
    texts = _definitions() | _named_for(config)
    wanted, unread = set(), ["GtJaxForCausalLM", "load"]
    while unread:
        wanted.add(name := unread.pop())
        used = {node.id for node in ast.walk(ast.parse(texts[name])) if isinstance(node, ast.Name)}
        unread += sorted((used & set(texts)) - wanted)
    chosen = [text for name, text in texts.items() if name in wanted]
    return "\n\n".join([HEADER.format(about=about), *(f"{text}\n" for text in chosen)])


def _check_fields(config):
    """Raise InputError for a choice that the parts know nothing of."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in (*_FORMS, *_NOT_STORED) and value != field.default:
            raise InputError(
                f"--format=pytorch: model.{field.name}={value!r} has no PyTorch form; it needs "
                f"{field.default!r}, or code in gt_jax/convert/pytorch"
            )


def _named_for(config) -> dict[str, str]:
    """The definitions that name others by the model's choice, with these names filled in."""
    names = {"HybridBlock": _block(config)}
    if config.architecture in ("rwkv6", "gpt2") and config.branch == "official":
        names["RMSNorm"] = "LayerNorm"
    changes = {"LanguageModel": names, "AttentionBlock": names}
    if config.position_limit is not None:
        positional = {"LanguageModel": "PositionalLanguageModel"}
        changes |= {"load": positional, "GtJaxForCausalLM": positional}
    if config.architecture == "hybrid":
        changes["HybridBlock"] = _branches(config) | {"Gate": _fusion(config.fusion)}
    definitions = _definitions()
    texts = {name: _replace(definitions[name], words) for name, words in changes.items()}
    if config.architecture == "hybrid" and getattr(FUSIONS[config.fusion], "reads_input", False):
        block = texts["HybridBlock"]
        texts["HybridBlock"] = block.replace(", fusion_state)\n", ", fusion_state, n)\n", 1)
    return texts


def _block(config):
    legacy = config.architecture == "rwkv6" and config.branch == "legacy"
    return "LegacyBlock" if legacy else BLOCKS[config.architecture]


def _branches(config):
    """Names in HybridBlock -> those of this model's two branches."""
    mixers = {"rwkv": "TimeMix" if config.branch == "official" else "LegacyBranch"}
    mixers["mamba"] = "Mamba2"
    first, second = config.branch_names
    kinds = (mixers[name.removesuffix("_2")] for name in (first, second))
    words = dict(zip(("TimeMix", "Mamba2"), kinds)) | {"rwkv": first, "mamba": second}
    return words | {"rwkv_state": f"{first}_state", "mamba_state": f"{second}_state"}


def _fusion(name):
    """The class of a fusion; InputError if only its Flax module is written."""
    written, wanted = _definitions(), FUSIONS[name].__name__
    if wanted not in written:
        others = ", ".join(n for n, module in FUSIONS.items() if module.__name__ in written)
        raise InputError(
            f"--format=pytorch: model.fusion={name!r} has no PyTorch form; write class {wanted} in "
            f"gt_jax/convert/pytorch/fusions.py (there are {others})"
        )
    return wanted


def _replace(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\b\w+\b", lambda match: words.get(match[0], match[0]), text)


@functools.cache
def _definitions() -> dict[str, str]:
    """Name -> source of every class and function in the parts, in their order."""
    found = {}
    for part in PARTS:
        text = (Path(__file__).parent / "pytorch" / f"{part}.py").read_text("utf-8")
        lines = text.split("\n")
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                body = "\n".join(lines[start - 1 : node.end_lineno])
                found[node.name] = re.sub("  # noqa: .*", "", body)
    return found


# Names of tensors: "blocks_1/rwkv/key/kernel" is "model.blocks.1.rwkv.key.weight".


@functools.cache
def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules of a model, with a * where all blocks have the tensor."""
    model = make_model(dataclasses.replace(config, layers=min(config.layers, 2)))
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    paths = list(flatten_dict(params, sep="/"))
    of_all = {p for p in paths if p.replace("blocks_0/", "blocks_1/") in paths}
    rules = []
    for path in paths:
        if path in of_all and path.startswith("blocks_"):
            path = path.replace("blocks_0/", "blocks_*/")
        if not path.startswith("blocks_1/"):
            rules.append(_rule(path))
    return tuple(rules)


def _rule(path: str) -> Rule:
    *modules, last = path.split("/")
    # A Dense is an nn.Linear, with its axes swapped; a fusion's own kernel stays as it is.
    is_dense = last == "kernel" and modules[-1] != "fusion"
    name = "weight" if is_dense or last in ("scale", "embedding") else last
    if path == "head":
        is_dense, name = True, "head.weight"
    theirs = ".".join(["model", *modules, name]).replace("blocks_", "blocks.")
    return Rule(path, theirs, transpose if is_dense else keep)


# Fields of ModelConfig that are of training or of this machine, not of the model.
_NOT_STORED = ("dtype", "impl", "remat")
# Those that the PyTorch file has a form for. Any other must have its default.
_FORMS = (
    *("vocab_size", "architecture", "dim", "layers", "heads", "state_size"),
    *("mamba_head_dim", "mamba_groups", "mix_rank", "decay_rank"),
    *("fusion", "gate_init", "branches", "branch", "legacy_wkv", "init"),
    *("tie_embeddings", "feed_forward", "mamba_feed_forward", "max_positions"),
    *("residual", "post_norm", "branch_epsilon", "learned_states"),
    # How a model starts, and what it keeps where one document follows another: here there is one.
    *("branch_start", "rwkv_carry"),
)


def _stored(config: ModelConfig) -> dict[str, Any]:
    """The fields of ModelConfig, and what the PyTorch file need not derive from them."""
    mix, decay = ranks(config)
    fusion = FUSIONS.get(config.fusion)
    return {name: getattr(config, name) for name in _FORMS} | {
        "mix_rank": mix,
        "decay_rank": decay,
        "fusion_eps": config.branch_epsilon or getattr(fusion, "branch_epsilon", BRANCH_EPSILON),
        "post_norm_eps": config.branch_epsilon or BRANCH_EPSILON,
        "ffn_dim": hidden_dim(config.dim),
    }


def _norm_eps(architecture: str, branch: str) -> float:
    official = architecture == "rwkv6" and branch == "official"
    return 1e-5 if official or architecture in ("mamba2", "gpt2") else 1e-6


def _config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GtJaxForCausalLM"],
        "model_type": "gt_jax",
        "auto_map": {
            "AutoConfig": "modeling_gt_jax.GtJaxConfig",
            "AutoModelForCausalLM": "modeling_gt_jax.GtJaxForCausalLM",
        },
        "dtype": "float32",
        # Of transformers' own machinery: the PyTorch file ties its embedding itself.
        "tie_word_embeddings": False,
        "norm_eps": _norm_eps(config.architecture, config.branch),
        **_stored(config),
    }


def _fields(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    settings.check(config, SETTINGS)
    if "architecture" not in config:
        raise InputError("config.json: architecture is missing; export the model again")
    kind, norm_eps = config["architecture"], config.get("norm_eps")
    if norm_eps != (ours := _norm_eps(kind, config.get("branch", "official"))):
        raise InputError(
            f"config.json: norm_eps={settings.shown(norm_eps)} must be {ours} for architecture="
            f"{settings.shown(kind)}"
        )
    vocab_size, dim = shape_of(tensors, "model.embedding.weight", 2)
    fields = {name: config[name] for name in _FORMS if name in config}
    fields |= rank_fields(config.get("mix_rank"), config.get("decay_rank"), dim)
    layers = count_blocks(tensors, "model.blocks.*.")
    return fields | {"vocab_size": vocab_size, "dim": dim, "layers": layers}


SETTINGS = Settings(
    model_types=("gt_jax",),
    architectures=("GtJaxForCausalLM",),
    wanted={},
    defaults={},
    sizes=_stored,
    layers="layers",
    free=frozenset(["tie_word_embeddings", "norm_eps"]),
)
LAYOUTS = {
    "pytorch": Layout(
        about="any model, with a PyTorch file of its own for transformers and alone, a folder",
        architecture=None,
        mark="model.embedding.weight",
        rules=_rules,
        fields=_fields,
        settings=SETTINGS,
        config=_config,
        weights="model.safetensors",
        states=True,
    )
}
