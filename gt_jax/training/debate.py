"""Auxiliary losses of a hybrid's two branches and of the weights that join them; off by default.

    objective = task + sum over terms of  weight * schedule(step / steps) * term

With what the fusion reads of RWKV-6 and Mamba-2, r and m [B, T, D], and r's weight w in (0, 1):

    diversity  orthogonal: cos(r, m)^2              published: (1 + cos(r, m)) / 2
    arbiter    - q ln w - (1 - q) ln(1 - w),  task: q = sigmoid((nats_m - nats_r) / temperature);
               published: q = 1 where r is nearer than m to `fused` (mix) or the last block's output
    branch     (nats_r + nats_m) / 2,  nats_r = cross-entropy of softmax(head final_norm(x + r)),
               r normalised like the update under model.post_norm
    entropy    mixing: 1 - H / ln 2                 published: H = - w ln w - (1 - w) ln(1 - w)
    balance    (s - 1/2)^2,  s = mean of |w r|^2 / (|w r|^2 + |(1 - w) m|^2) over a row

x is the residual stream before the block; q takes no gradient. The orthogonal diversity is of the
mixers' own outputs, without the input that model.residual adds. Published forms are of r, m and w
averaged over blocks, as in the original's notebooks, and have faults that the others avoid: the
diversity is least where m = -c r, two branches that say one thing; the mix is nearest to whichever
branch weighs more already; the entropy, added, is least where one branch has all the weight.

Each term is a sum over the counted tokens of a batch, to be divided by the whole batch's count: so
microbatches and devices add up to its exact gradient. The balance is of whole rows: devices that
share them (parallel.sequence) add up their tokens first.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gt_jax.config import Config, Debate
from gt_jax.errors import InputError
from gt_jax.models import LanguageModel, ModelConfig, make_model
from gt_jax.models.gates import post_norm
from gt_jax.models.hybrid import with_residuals
from gt_jax.models.layers import over_devices_of_row, rms_norm

NAMES = ("diversity", "arbiter", "branch", "entropy", "balance")
NEED_WEIGHT = ("arbiter", "entropy", "balance")  # of a fusion, one a position

_CHUNK = 2**24  # logits of a chunk of tokens: 64 MiB of float32
_LEAST = 1e-8  # weight in a logarithm
_SMALL = 1e-6  # beside a mean square: RWKV-6 starts at exactly zero


class _Branches(NamedTuple):
    """What a block recorded, [B, T, D] float32: x and y, the residual stream before and after.

    r and m are what its fusion read, own_r and own_m what the mixers said; w is [B, T].
    """

    x: jax.Array
    y: jax.Array
    r: jax.Array
    m: jax.Array
    own_r: jax.Array
    own_m: jax.Array
    w: jax.Array | None


def active(settings: Debate) -> tuple[str, ...]:
    """The terms whose weight is not the number 0; an array, which the laboratory sweeps, is not."""
    is_zero = lambda weight: isinstance(weight, int | float) and weight == 0
    return tuple(name for name in NAMES if not is_zero(getattr(settings, f"{name}_weight")))


def make_terms(model: LanguageModel, config: Config) -> Callable | None:
    """The active terms of a run's debate group.

    Returns:
        terms(params, sown, targets) -> {name: [] float32, summed over counted targets}, of a
        model's "activations" for tokens whose targets [B, T] follow; None if no term is active.

    Raises:
        InputError: the model has no two branches, its fusion no weight that a term needs, or
            debate.blocks names no block of it.
    """
    settings, names = config.debate, active(config.debate)
    if not names:
        return None
    _check(model.config, names)
    blocks = decoded_blocks(settings, model.config.layers)

    def terms(params, sown, targets):
        found = _branches(model.config, sown["activations"])
        counted = targets >= 0
        nats = {}
        if "branch" in names or ("arbiter" in names and settings.arbiter_target == "task"):
            nats = {
                layer: _branch_nats(model.config, params, layer, found[layer], targets)
                for layer in blocks
            }
        make = {
            "diversity": lambda: _diversity(settings, found),
            "arbiter": lambda: _arbiter(settings, found, nats),
            "branch": lambda: _total(r + m for r, m in nats.values()) / (2 * len(nats)),
            "entropy": lambda: _entropy(settings, found),
            "balance": lambda: _balance(found, counted),
        }
        return {name: jnp.sum(make[name](), where=counted) for name in names}

    return terms


def weighted(settings: Debate, step: jax.Array, steps: int, terms: Mapping) -> jax.Array:
    """[] sum of the terms, each times its weight and the schedule at a step."""
    scale = schedule(settings, step, steps)
    return scale * _total(getattr(settings, f"{name}_weight") * terms[name] for name in terms)


def schedule(settings: Debate, step: jax.Array | int, steps: int) -> jax.Array | float:
    """What multiplies the weights at a step of 0, ..., steps - 1; [] in [0, 1]."""
    progress = step / steps
    if settings.schedule == "exponential":
        return jnp.exp(-3.0 * progress)
    if settings.schedule == "fade":
        width = jnp.maximum(settings.fade_to - settings.fade_from, 1e-9)
        return jnp.clip((settings.fade_to - progress) / width, 0, 1)
    return 1.0


def decoded_blocks(settings: Debate, layers: int) -> list[int]:
    """The numbers of the blocks that debate.blocks names, of a model of so many layers.

    Raises:
        InputError: it names none.
    """
    if settings.blocks in ("last", "all"):
        return list(range(layers)) if settings.blocks == "all" else [layers - 1]
    try:
        blocks = sorted({int(number) for number in settings.blocks.split(",")})
    except ValueError:
        blocks = []
    if not blocks or blocks[0] < 0 or blocks[-1] >= layers:
        raise InputError(
            f"debate.blocks={settings.blocks!r} must be last, all or numbers between 0 and "
            f"{layers - 1} with commas between"
        )
    return blocks


def _check(config: ModelConfig, names) -> None:
    if config.architecture != "hybrid":
        raise InputError(
            f"debate.{names[0]}_weight needs model.architecture='hybrid', not "
            f"{config.architecture!r}: set it to 0"
        )
    need = [name for name in names if name in NEED_WEIGHT]
    if need and not weighs_positions(config):
        raise InputError(
            f"debate.{need[0]}_weight needs a fusion that weighs its branches position by position,"
            f" which model.fusion={config.fusion!r} does not: set it to 0 or take gf"
        )


def weighs_positions(config: ModelConfig) -> bool:
    """Whether a hybrid's fusion records a weight of the RWKV branch for every position."""
    model = make_model(dataclasses.replace(config, layers=1, impl="reference", remat="none"))
    tokens = jnp.zeros((1, 2), jnp.int32)

    def recorded():
        params = model.init(jax.random.key(0), tokens)["params"]
        return model.apply({"params": params}, tokens, mutable=["activations"])[1]

    fusion = jax.eval_shape(recorded)["activations"]["blocks_0"].get("fusion", {})
    return "gate" in fusion and len(fusion["gate"][0].shape) == 3


def _branches(config, blocks) -> list[_Branches]:
    found = []
    for layer in range(config.layers):
        block = blocks[f"blocks_{layer}"]
        names = ("block_stream", "block_out", "rwkv_out", "mamba_out", "block_input")
        x, y, own_r, own_m, n = (block[name][0].astype(jnp.float32) for name in names)
        r, m = with_residuals(config, own_r, own_m, n)
        w = block.get("fusion", {}).get("gate", [None])[0]
        w = None if w is None or w.ndim < 3 else jnp.mean(w, axis=-1, dtype=jnp.float32)
        found.append(_Branches(x, y, r, m, own_r, own_m, w))
    return found


def _mean(found, name) -> jax.Array:
    """Over blocks."""
    return _total(getattr(branches, name) for branches in found) / len(found)


def _total(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _cosine(a, b) -> jax.Array:
    """[B, T], 0 where one is 0."""
    square = lambda x: jnp.mean(x * x, axis=-1) + _SMALL
    return jnp.mean(a * b, axis=-1) * jax.lax.rsqrt(square(a) * square(b))


def _diversity(settings, found) -> jax.Array:
    if settings.diversity == "published":
        return 0.5 * (1 + _cosine(_mean(found, "r"), _mean(found, "m")))
    return _total(jnp.square(_cosine(b.own_r, b.own_m)) for b in found) / len(found)


def _cross_entropy(q, w) -> jax.Array:
    """Of RWKV's weight w and what it should be, [B, T]."""
    # Not log(1 - w + least), which XLA turns into log((1 + least) - w): minus infinity at w = 1.
    log = lambda x: jnp.log(jnp.maximum(x, _LEAST))
    return -q * log(w) - (1 - q) * log(1 - w)


def _arbiter(settings, found, nats) -> jax.Array:
    if settings.arbiter_target == "task":
        targets = {
            layer: jax.nn.sigmoid((of_m - of_r) / settings.arbiter_temperature)
            for layer, (of_r, of_m) in nats.items()
        }
        losses = (
            _cross_entropy(jax.lax.stop_gradient(q), found[layer].w) for layer, q in targets.items()
        )
        return _total(losses) / len(targets)
    r, m, w = (_mean(found, name) for name in ("r", "m", "w"))
    target = found[-1].y
    if settings.arbiter_target == "mix":
        target = w[..., None] * r + (1 - w[..., None]) * m
    error = lambda branch: jnp.mean(jnp.square(branch - target), axis=-1)
    nearer = jax.lax.stop_gradient(error(r) < error(m))
    return _cross_entropy(nearer.astype(jnp.float32), w)


def _entropy(settings, found) -> jax.Array:
    entropies = (_cross_entropy(b.w, b.w) for b in found)
    mean = _total(entropies) / len(found)
    return mean if settings.entropy == "published" else 1 - mean / jnp.log(2.0)


def _balance(found, counted) -> jax.Array:
    """[B, T], the same at every position of a row."""
    losses, tokens = [], over_devices_of_row(jnp.sum(counted, axis=1, keepdims=True))  # [B, 1]
    for b in found:
        of_r = jnp.sum(jnp.square(b.w[..., None] * b.r), axis=-1)
        of_m = jnp.sum(jnp.square((1 - b.w[..., None]) * b.m), axis=-1)
        share = of_r / (of_r + of_m + 1e-12)
        total = over_devices_of_row(jnp.sum(share, axis=1, where=counted, keepdims=True))
        row = total / jnp.maximum(tokens, 1)  # [B, 1]
        losses.append(jnp.square(row - 0.5))
    return jnp.broadcast_to(_total(losses), counted.shape)


def _branch_nats(config, params, layer, branches, targets) -> tuple[jax.Array, jax.Array]:
    """[B, T] nats of RWKV-6 and of Mamba-2, each decoded as if it were the block's only update."""
    norm = rms_norm(config, "final_norm")
    embedding = params["embedding"]["embedding"]
    head = embedding.T if config.tie_embeddings else params["head"]

    def nats(branch):
        if config.post_norm:
            own = params[f"blocks_{layer}"]["fused_norm"]
            branch = post_norm(config, "fused_norm").apply({"params": own}, branch)
        x: Any = norm.apply({"params": params["final_norm"]}, branches.x + branch)
        flat = token_nats(x.reshape(-1, config.dim), head, targets.ravel())
        return flat.reshape(targets.shape)

    return nats(branches.r), nats(branches.m)


def token_nats(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of softmax(x head), token by token, with few logits in memory at a time.

    Args:
        x: [N, D] in the computation dtype.
        head: [D, V] float32.
        targets: [N] int; those below 0 do not count.

    Returns:
        [N] float32, 0 where a target does not count.
    """
    N, V = x.shape[0], head.shape[1]
    chunks = -(-N * V // _CHUNK)
    weights = head.astype(x.dtype)

    @jax.checkpoint
    def of_chunk(chunk):
        x, targets = chunk
        logits = jnp.matmul(x, weights, preferred_element_type=jnp.float32)  # [n, V]
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)

    if chunks == 1:
        return of_chunk((x, targets))
    padding = -N % chunks
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(chunks, -1, x.shape[1])
    targets = jnp.pad(targets, (0, padding), constant_values=-1).reshape(chunks, -1)
    return jax.lax.map(of_chunk, (x, targets)).reshape(-1)[:N]
