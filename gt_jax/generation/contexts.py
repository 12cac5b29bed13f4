"""A model's memory of a text: made in chunks, saved to a file, continued by requests.

Prefill reads a text in whole chunks of a few sizes, without any padding, each one call of the
model. The last tokens, at most as many as the smallest chunk, wait for the decoding loop, which
reads them one by one: the loop needs the logits of the last one, and this way no other shape has to
be compiled.
"""

import dataclasses
import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from gt_jax import archives
from gt_jax.data.corpora import replace_file
from gt_jax.errors import InputError, one_line
from gt_jax.generation.checks import check_ids, token_ids
from gt_jax.models import LanguageModel, Params

PREFILL_CHUNKS = (64, 256, 1024, 4096, 16384)  # tokens; few sizes are few compilations
LARGEST_ABOUT = 1 << 20  # bytes of what a file says of its model, some 4 kB
NOT_OF_THE_FUNCTION = ("dtype", "impl", "remat")  # ModelConfig fields any context fits


class Context(NamedTuple):
    """A text as a model remembers it; `prefill` makes them.

    state: the model's state after all tokens but the waiting ones, a batch of one row.
    waiting: [n] int32, the last 1 to 64 tokens.
    seen: [vocab] bool, the tokens that occur anywhere in the text.
    length: tokens in all.
    """

    state: Any
    waiting: np.ndarray
    seen: np.ndarray
    length: int


def prefill(
    model: LanguageModel, params: Params, tokens: ArrayLike, after: Context | None = None
) -> Context:
    """Read a text of any length; the largest chunk alone decides how much memory that takes.

    Args:
        model, params: from `gt_jax.load`.
        tokens: [T] ids; may be empty where `after` is given.
        after: the context of the text before; it does not change, so other texts can continue it.

    Raises:
        InputError: there are no tokens, a token is no id of the vocabulary, or an attention model
            has too few positions.
    """
    context = start_prefill(model, params, tokens, after)
    while next_chunk(context):
        context = prefill_chunk(model, params, context)
    return context


def start_prefill(
    model: LanguageModel, params: Params, tokens: ArrayLike, after: Context | None = None
) -> Context:
    """The Context of `prefill` with all its chunks still among the waiting tokens."""
    config = model.config
    new = token_ids("prompt", tokens)
    check_ids("prompt", new, config.vocab_size)
    if after is None:
        after = Context(None, np.zeros(0, np.int32), np.zeros(config.vocab_size, bool), 0)
    length = after.length + len(new)
    if length == 0:
        raise InputError("prompt is empty; give it at least one token")
    if config.position_limit is not None and length > config.position_limit:
        raise InputError(
            f"prompt of {length} tokens exceeds the {config.position_limit} positions of this model"
        )
    seen = after.seen.copy()
    seen[new] = True
    waiting = np.concatenate([after.waiting, new.astype(np.int32)])
    state = zero_state(model, params) if after.state is None else after.state
    return Context(state, waiting, seen, length)


def next_chunk(context: Context) -> int:
    """Tokens of the next chunk of a text, 0 when no whole chunk is left."""
    return max((size for size in PREFILL_CHUNKS if size < len(context.waiting)), default=0)


def prefill_chunk(model: LanguageModel, params: Params, context: Context) -> Context:
    """The context with its next chunk read."""
    size, waiting = next_chunk(context), context.waiting
    state = _prefill_chunk(model, params, waiting[None, :size], context.state)
    return context._replace(state=state, waiting=waiting[size:])


@functools.partial(jax.jit, static_argnames=("model", "rows"), keep_unused=True)
def zero_state(model: LanguageModel, params: Params, rows: int = 1) -> Any:
    """The model's state before any token, for this many rows.

    It lives on the device of `params`. Anywhere else, every function that takes it would be
    compiled twice: for the first call, and for later ones with a state that has moved.
    """
    del params
    return model.init_state(rows)


@functools.partial(jax.jit, static_argnames="model")
def _prefill_chunk(model, params, tokens, state):
    _, after = model.apply({"params": params}, tokens, state)
    return after  # XLA drops the output head, since nobody reads the logits


def save_context(path: str | Path, model: LanguageModel, params: Params, context: Context) -> None:
    """Write a context to the file `path`, for `load_context`; an old file there is replaced."""
    leaves = jax.device_get(_named(context.state))
    arrays = {
        name: leaf.astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf  # NumPy has none
        for name, leaf in leaves.items()
    }
    about = {"model": _function(model), "parameters": fingerprint(params), "length": context.length}
    file = io.BytesIO()
    np.savez(file, about=json.dumps(about), waiting=context.waiting, seen=context.seen, **arrays)
    replace_file(Path(path), file.getvalue())


def load_context(path: str | Path, model: LanguageModel, params: Params) -> Context:
    """The context that `save_context` wrote for this model, its dtype aside.

    Raises:
        InputError: the file is missing, no context, damaged, or of another model or parameters.
    """
    path = Path(path)
    try:
        stored = archives.arrays(path)
        about = stored.pop("about")
        if about.dtype.itemsize > LARGEST_ABOUT or about.shape:
            raise ValueError("it says too much of itself")
        about = json.loads(str(about.read()))
        of_model, of_params, length = dict(about["model"]), about["parameters"], about["length"]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; name a file that --save_state wrote") from error
    except Exception as error:  # a damaged zip file can raise anything
        raise InputError(f"{path} is no saved state, or damaged ({one_line(error)})") from error
    mine = _function(model)
    defaults = {field.name: field.default for field in dataclasses.fields(model.config)}
    for field in sorted(mine):
        found = of_model.get(field, defaults.get(field))  # a newer field acted as its default
        if found != mine[field]:
            theirs = one_line(repr(found), 80)
            raise InputError(
                f"{path} is the state of another model: its model.{field} is {theirs}, this one's "
                f"{mine[field]!r}"
            )
    if of_params != fingerprint(params):
        raise InputError(
            f"{path} is the state of the same kind of model with other parameters; "
            "use the checkpoint it was saved with"
        )
    like = jax.eval_shape(functools.partial(zero_state, model), params)
    try:
        return _restore(stored, length, like, model.config)
    except Exception as error:  # as above
        raise InputError(f"{path} is no saved state, or damaged ({one_line(error)})") from error


def _restore(stored, length, like, config) -> Context:
    """The Context of arrays that are read only if they have its shapes, ValueError if not."""
    named = _named(like)
    wanted = {name: (leaf.shape, _stored_dtype(leaf)) for name, leaf in named.items()}
    wanted |= {"seen": ((config.vocab_size,), np.dtype(bool))}
    tokens = stored.pop("waiting")
    if (
        {name: (array.shape, array.dtype) for name, array in stored.items()} != wanted
        or len(tokens.shape) != 1
        or not 1 <= tokens.shape[0] <= PREFILL_CHUNKS[0]
        or tokens.dtype.kind != "i"
    ):
        raise ValueError("its arrays have other shapes or types than this model's state")
    waiting, seen = tokens.read(), stored["seen"].read()
    if not 0 <= waiting.min() <= waiting.max() < config.vocab_size:
        raise ValueError("its arrays have other shapes or ids than this model's state")
    most = 2**62 if config.position_limit is None else config.position_limit
    if type(length) is not int or not len(waiting) <= length <= most or not seen[waiting].all():
        raise ValueError("its length and the tokens it has seen do not fit together")
    leaves = [jnp.asarray(stored[name].read(), leaf.dtype) for name, leaf in named.items()]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Context(state, waiting.astype(np.int32), seen, length)


def _stored_dtype(leaf):
    """The dtype of a state's array in a file: NumPy has no bfloat16."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return np.dtype(np.float32) if floating else np.dtype(leaf.dtype)


def fingerprint(params: Params) -> str:
    """A digest of parameters, the same on every device; reads them once, where they are."""
    sums = jax.device_get(_weighted_bits(params))
    lines = [f"{name} {int(total)}" for name, total in _named(sums).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _weighted_bits(params):
    """For every array, the sum of its bits as integers times odd weights, modulo 2^32."""

    def weigh(x):
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).ravel()
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1))

    return jax.tree.map(weigh, params)


def _named(tree):
    """Path -> leaf, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def _function(model):
    """The fields of a model's config that change its results."""
    fields = vars(model.config)
    return {name: fields[name] for name in fields if name not in NOT_OF_THE_FUNCTION}
