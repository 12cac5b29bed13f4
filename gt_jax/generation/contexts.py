"""A model's memory of a text: made in chunks, saved to a file, continued by requests.

Prefill reads a text in whole chunks of a few sizes, without any padding, each one call of the
model. The last tokens, at most as many as the smallest chunk, wait for the decoding loop, which
reads them one by one: the loop needs the logits of the last one, and this way no other shape has to
be compiled.

The length of a text alone decides its chunks, however many calls of `prefill` bring it, because
chunks of other sizes round differently. Every chunk begins at a multiple of its size. A text that
grows past the next multiple of a larger chunk is read again from the multiple before, in one chunk;
`marks` keep the states there. So a token is read at most once in a chunk of every size.
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
from gt_jax.finite import check_finite
from gt_jax.generation.checks import check_ids, token_ids
from gt_jax.models import LanguageModel, Params
from gt_jax.models.carry import first_state

PREFILL_CHUNKS = (64, 256, 1024, 4096, 16384)  # tokens; few sizes are few compilations
LARGEST_ABOUT = 1 << 20  # bytes of what a file says of its model, some 4 kB
NOT_OF_THE_FUNCTION = ("dtype", "impl", "remat")  # ModelConfig fields any context fits


class Mark(NamedTuple):
    """The model's state after the first `position` tokens of a text."""

    position: int
    state: Any


class Context(NamedTuple):
    """A text as a model remembers it; `prefill` makes them.

    state: the model's state after all tokens but the waiting ones, a batch of one row.
    waiting: [n] int32, the last 1 to 64 tokens.
    seen: [vocab] bool, the tokens that occur anywhere in the text.
    length: tokens in all.
    marks: where a longer text may have to be read again from; none at the text's beginning.
    recent: [n] int32, the tokens read since the last multiple of the largest chunk.
    """

    state: Any
    waiting: np.ndarray
    seen: np.ndarray
    length: int
    marks: tuple[Mark, ...] = ()
    recent: np.ndarray = np.zeros(0, np.int32)


def prefill(
    model: LanguageModel, params: Params, tokens: ArrayLike, after: Context | None = None
) -> Context:
    """Read a text of any length; the largest chunk alone decides how much memory that takes.

    Args:
        model, params: from `gt_jax.load`.
        tokens: [T] ids; may be empty where `after` is given.
        after: the context of the text before; it does not change, so other texts can continue it.

    Returns:
        A Context of the same bits however the text is divided between calls, on one device and by
        the same compiled programs. One that an earlier version saved has no marks: what continues
        it is read in the chunks of its own length.

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
    context = _return_to_mark(model, params, after, length)
    waiting = np.concatenate([context.waiting, new.astype(np.int32)])
    return context._replace(waiting=waiting, seen=seen, length=length)


def _return_to_mark(model, params, context, length) -> Context:
    """The context where the chunks of a text of this length first differ from its own."""
    if context.state is None:
        return context._replace(state=start_state(model, params))
    read = context.length - len(context.waiting)
    own, longer = _ends_of_chunks(context.length), _ends_of_chunks(length)
    to = next((end for end, other in zip(own, longer) if end != other), read)
    states = {mark.position: mark.state for mark in context.marks} | {read: context.state}
    if to == 0:
        states[0] = start_state(model, params)
    again = read - to
    if to not in states or again > len(context.recent):  # an earlier version saved it
        return context
    n = len(context.recent) - again
    waiting = np.concatenate([context.recent[n:], context.waiting])
    marks = tuple(mark for mark in context.marks if mark.position < to)
    return context._replace(
        state=states[to], waiting=waiting, marks=marks, recent=context.recent[:n]
    )


def _ends_of_chunks(length) -> list[int]:
    """The tokens of a text that are read in chunks of at least each size, largest size first."""
    return [(length - 1) // size * size for size in reversed(PREFILL_CHUNKS)]


def next_chunk(context: Context) -> int:
    """Tokens of the next chunk of a text, 0 when no whole chunk is left."""
    return max((size for size in PREFILL_CHUNKS if size < len(context.waiting)), default=0)


def prefill_chunk(model: LanguageModel, params: Params, context: Context) -> Context:
    """The context with its next chunk read."""
    size, waiting, marks = next_chunk(context), context.waiting, context.marks
    read, ends = context.length - len(waiting), _ends_of_chunks(context.length)
    if read and read in ends:
        marks = (*marks, Mark(read, context.state))
    recent = np.concatenate([context.recent, waiting[:size]])
    recent = recent[max(len(recent) - max(read + size - ends[0], 0), 0) :]
    state = _prefill_chunk(model, params, waiting[None, :size], context.state)
    return context._replace(state=state, waiting=waiting[size:], marks=marks, recent=recent)


@functools.partial(jax.jit, static_argnames=("model", "rows"), keep_unused=True)
def start_state(model: LanguageModel, params: Params, rows: int = 1) -> Any:
    """The model's state before any token, zero or learned, for this many rows.

    It lives on the device of `params`. Anywhere else, every function that takes it would be
    compiled twice: for the first call, and for later ones with a state that has moved.
    """
    return first_state(model.config, params, model.init_state(rows))


@functools.partial(jax.jit, static_argnames="model")
def _prefill_chunk(model, params, tokens, state):
    _, after = model.apply({"params": params}, tokens, state)
    return after  # XLA drops the output head, since nobody reads the logits


def save_context(path: str | Path, model: LanguageModel, params: Params, context: Context) -> None:
    """Write a context to the file `path`, for `load_context`; an old file there is replaced."""
    leaves = jax.device_get(_named_states(context.state, context.marks))
    arrays = {
        name: leaf.astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf  # NumPy has none
        for name, leaf in leaves.items()
    }
    about = {"model": _function(model), "parameters": fingerprint(params), "length": context.length}
    about["marks"] = [mark.position for mark in context.marks]
    arrays |= {"waiting": context.waiting, "seen": context.seen, "recent": context.recent}
    file = io.BytesIO()
    np.savez(file, about=json.dumps(about), **arrays)
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
        marks = list(about.get("marks", ()))  # earlier versions wrote none
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
    like = jax.eval_shape(functools.partial(start_state, model), params)
    try:
        return _restore(stored, length, marks, like, model.config)
    except Exception as error:  # as above
        raise InputError(f"{path} is no saved state, or damaged ({one_line(error)})") from error


def _restore(stored, length, positions, like, config) -> Context:
    """The Context of arrays that are read only if they have its shapes, ValueError if not."""
    if len(positions) >= len(PREFILL_CHUNKS) or not all(type(p) is int for p in positions):
        raise ValueError("it says at too many places what the state was")
    named = _named_states(like, [Mark(position, like) for position in positions])
    wanted = {name: (leaf.shape, _stored_dtype(leaf)) for name, leaf in named.items()}
    wanted |= {"seen": ((config.vocab_size,), np.dtype(bool))}
    tokens = stored.pop("waiting")
    recent = stored.pop("recent") if "recent" in stored else None
    if {name: (array.shape, array.dtype) for name, array in stored.items()} != wanted:
        raise ValueError(_OTHER_SHAPES)
    waiting, seen = _restore_ids(tokens, config, 1, PREFILL_CHUNKS[0]), stored["seen"].read()
    recent = np.zeros(0, np.int32) if recent is None else recent
    recent = _restore_ids(recent, config, 0, PREFILL_CHUNKS[-1])
    most = 2**62 if config.position_limit is None else config.position_limit
    known = seen[waiting].all() and seen[recent].all()
    if type(length) is not int or not len(waiting) <= length <= most or not known:
        raise ValueError("its length and the tokens it has seen do not fit together")
    read, ends = length - len(waiting), _ends_of_chunks(length)
    needed = sorted({end for end in ends if 0 < end < read})
    if (positions, len(recent)) not in (([], 0), (needed, read - ends[0])):
        raise ValueError("its length and the places it marks do not fit together")
    arrays = {name: stored[name].read() for name in named}
    check_finite(arrays, "its state", "read the text again")
    leaves = [jnp.asarray(arrays[name], leaf.dtype) for name, leaf in named.items()]
    structure = jax.tree.structure(like)
    per_state = structure.num_leaves
    states = [
        jax.tree.unflatten(structure, leaves[start : start + per_state])
        for start in range(0, len(leaves), per_state)
    ]
    marks = tuple(map(Mark, positions, states[1:]))
    return Context(states[0], waiting, seen, length, marks, recent)


def _restore_ids(array, config, low, high) -> np.ndarray:
    """[n] int32 ids of an array in a file, with low <= n <= high."""
    shape = array.shape
    if len(shape) != 1 or not low <= shape[0] <= high or array.dtype.kind != "i":
        raise ValueError(_OTHER_SHAPES)
    ids = np.asarray(array.read() if hasattr(array, "read") else array)
    if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise ValueError(_OTHER_SHAPES)
    return ids.astype(np.int32)


_OTHER_SHAPES = "its arrays have other shapes, types or ids than this model's state"


def _named_states(state, marks):
    """Name -> leaf of a state and of those at its marks, whose names begin with the position."""
    named = _named(state)
    for mark in marks:
        named |= {f"{mark.position}:{name}": leaf for name, leaf in _named(mark.state).items()}
    return named


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
