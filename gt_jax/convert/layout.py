"""How another library names, shapes and stores the parameters of a model, and the way between.

A layout is a table of rules, (our path, their name, change), with a * for the block's number. The
same table serves both ways and tells which tensors are missing, unknown or of the wrong shape.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gt_jax.convert.settings import Settings
from gt_jax.convert.tensor import Tensor
from gt_jax.errors import InputError
from gt_jax.finite import check_finite
from gt_jax.models import ModelConfig, Params, make_model


class Change(NamedTuple):
    """What turns our array, or arrays, into theirs, and theirs back."""

    there: Callable
    back: Callable


FLOATS = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}

keep = Change(lambda x: x, lambda x: x)
transpose = Change(np.transpose, np.transpose)  # dense kernels: ours [in, out], PyTorch's [out, in]


class Rule(NamedTuple):
    """One of their tensors; `ours` is a path such as "blocks_*/rwkv/key/kernel", or several."""

    ours: str | tuple[str, ...]
    theirs: str
    change: Change = keep


class Layout(NamedTuple):
    """One library's way to store one architecture.

    Attributes:
        about: what it is, for people.
        architecture: ModelConfig.architecture; None if it holds all.
        mark: a tensor that no other layout has.
        rules: the table, or ModelConfig -> the table. Tied embeddings make do without the rule of
            "head".
        fields: (tensors, config.json) -> fields of ModelConfig. Raises InputError for a model that
            ours cannot be.
        settings: what config.json may say.
        config: ModelConfig -> config.json; None where weights are a bare file.
        weights: file name of the weights in their folder, or None.
        states: whether it holds learned states (model.learned_states).
    """

    about: str
    architecture: str | None
    mark: str
    rules: tuple[Rule, ...] | Callable[[ModelConfig], tuple[Rule, ...]]
    fields: Callable
    settings: Settings
    config: Callable | None
    weights: str | None
    states: bool = False


def count_blocks(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand for the * of a pattern, such as "blocks.*.", in names."""
    number = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    return len({match[1] for match in map(number.match, tensors) if match})


def shape_of(tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that tells the model's sizes; InputError if it is not there."""
    if name not in tensors or len(tensors[name].shape) != rank:
        raise InputError(f"{name} is missing, or not of rank {rank}")
    if 0 in tensors[name].shape:
        raise InputError(f"{name} {list(tensors[name].shape)} is empty")
    return tensors[name].shape


def read_params(layout: Layout, model_config: ModelConfig, tensors: dict[str, Tensor]) -> dict:
    """Their tensors as the parameters of our model, float32.

    Raises:
        InputError: tensors are missing, unknown, of another shape or no floating-point numbers, or
            hold NaN or infinity; the message names them and the shapes they should have.
    """
    if model_config.tie_embeddings:
        tensors = _without_tied_head(_table(layout, model_config), tensors)
    rules = _rules(layout, model_config)
    theirs = _their_shapes(layout, model_config, tensors)
    faults = [f"{name} {list(theirs[name])} is missing" for name in theirs if name not in tensors]
    for name, tensor in tensors.items():
        if name not in theirs:
            faults.append(f"{name} {list(tensor.shape)} is unknown")
        elif tensor.shape != theirs[name]:
            faults.append(f"{name} has shape {list(tensor.shape)}, not {list(theirs[name])}")
        elif tensor.dtype not in FLOATS:
            faults.append(f"{name} holds {tensor.dtype}, not floating-point numbers")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError("; ".join(faults[:3]) + more)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
        read = {name: tensors[name].read().astype(np.float32) for name in theirs}
    fix = "get the file again, or store the weights in a type with room for them, as float32"
    check_finite(read, "as float32 its weights are not finite", fix)
    params = {}
    for rule in rules:
        arrays = rule.change.back(read[rule.theirs])
        params |= zip(_paths(rule), arrays if isinstance(rule.ours, tuple) else [arrays])
    return unflatten_dict(params, sep="/")


def write_arrays(
    layout: Layout, model_config: ModelConfig, params: Params
) -> dict[str, np.ndarray]:
    """Our parameters as their tensors, float32 by name; a tied head is written out."""
    rules = [
        _of_block(rule, number)
        for rule in _table(layout, model_config)
        for number in _numbers(rule, model_config.layers)
    ]
    ours = {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}
    ours.setdefault("head", ours["embedding/embedding"].T)
    return {rule.theirs: rule.change.there(*(ours[p] for p in _paths(rule))) for rule in rules}


def _table(layout, model_config) -> tuple[Rule, ...]:
    return layout.rules if isinstance(layout.rules, tuple) else layout.rules(model_config)


def _without_tied_head(rules, tensors):
    """The tensors less a head that repeats the embedding."""
    by_path = {rule.ours: rule.theirs for rule in rules}
    head, embedding = by_path.get("head"), by_path["embedding/embedding"]
    if head not in tensors:
        return tensors
    ends = tensors[head].read(), tensors[embedding].read()
    if not np.array_equal(*ends, equal_nan=True):  # NaN has an error of its own
        raise InputError(f"{head} differs from {embedding}, and config.json says they are one")
    return {name: tensor for name, tensor in tensors.items() if name != head}


def _rules(layout, model_config):
    """The rules with block numbers filled in, less the one of a tied head."""
    table = _table(layout, model_config)
    rules = [rule for rule in table if rule.ours != "head" or not model_config.tie_embeddings]
    return [_of_block(r, number) for r in rules for number in _numbers(r, model_config.layers)]


def _numbers(rule, layers):
    return range(layers) if "*" in rule.theirs else (0,)


def _their_shapes(layout, model_config, tensors) -> dict[str, tuple[int, ...]]:
    """The shape that each of their tensors must have.

    Blocks are alike, so a model of one block tells all, however many the tensors claim.

    Raises:
        InputError: the sizes that some tensors tell are far beyond what all of them hold.
    """
    model = make_model(dataclasses.replace(model_config, layers=1))
    key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, key, tokens)["params"]
    flat = cast(dict[str, Any], flatten_dict(params, sep="/"))
    shapes = {path: x.shape for path, x in flat.items()}
    needed, held = (sum(map(math.prod, s)) for s in (shapes.values(), _shapes(tensors)))
    if needed > 8 * held + 1_000_000:
        raise InputError(
            f"a model of vocabulary {model_config.vocab_size:,}, dim {model_config.dim:,} and "
            f"state {model_config.state_size:,} has over {needed:,} numbers, and the tensors "
            f"{held:,}"
        )
    theirs = {}
    for rule in _table(layout, model_config):
        if rule.ours == "head" and model_config.tie_embeddings:
            continue
        shape = _their_shape(_of_block(rule, 0), shapes)
        numbers = _numbers(rule, model_config.layers)
        theirs |= {_of_block(rule, number).theirs: shape for number in numbers}
    return theirs


def _shapes(tensors):
    return [tensor.shape for tensor in tensors.values()]


def _of_block(rule, number):
    ours = tuple(path.replace("*", str(number)) for path in _paths(rule))
    theirs = rule.theirs.replace("*", str(number))
    return rule._replace(ours=ours if isinstance(rule.ours, tuple) else ours[0], theirs=theirs)


def _paths(rule):
    return rule.ours if isinstance(rule.ours, tuple) else (rule.ours,)


def _their_shape(rule, shapes):
    # An array of one number, however large its shape.
    zeros = [np.broadcast_to(np.float32(0), shapes[path]) for path in _paths(rule)]
    return rule.change.there(*zeros).shape
