"""A larger model that computes what a smaller one does: more blocks, or a multiple of its width.

Depth: the new blocks on top end in zero matrices, so at first they add nothing. Width: every
channel, head and hidden unit is copied several times. Norms see the same means and squares. A
matrix splits its weight for a channel among the copies, in random shares that sum to one: copies
with equal shares would have equal gradients for ever.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from gt_jax.convert import files, params, rwkv6
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig


def expand(
    source: str | Path,
    target: str | Path,
    *,
    layers: int | None = None,
    dim: int | None = None,
    seed: int = 0,
) -> str:
    """Write a deeper or wider model of the same function as a folder for `gt_jax.load`.

    Args:
        source: what `gt_jax.load` takes, of any architecture.
        target: folder to make.
        layers: blocks of the larger model; None for the same number.
        dim: its width, a multiple of the old one; None for the same. Heads keep their channels.
        seed: of new blocks and of the shares of copies.

    Returns:
        A line that says what was made.

    Raises:
        InputError: no larger model computes the same. Nothing is written.
    """
    files.check_free(target)
    old, weights, tokenizer = params.read(source)
    config = _larger(old, old.layers if layers is None else layers, old.dim if dim is None else dim)
    if config.dim > old.dim:
        wide = dataclasses.replace(config, layers=old.layers)
        weights = _widen(weights, old, wide, np.random.default_rng(seed))
    if config.layers > old.layers:
        blocks = tuple(f"blocks_{layer}/" for layer in range(old.layers, config.layers))
        silent = dataclasses.replace(config, init="blinkdl")  # its blocks add nothing
        weights |= params.new(silent, seed, lambda path: path.startswith(blocks))
    params.write(target, params.Stored(config, weights, tokenizer))
    return (
        f"{config.architecture} of {old.layers} x {old.dim} (blocks x width) as one of "
        f"{config.layers} x {config.dim}: {target}"
    )


def _larger(old: ModelConfig, layers: int, dim: int) -> ModelConfig:
    """The larger model's configuration; InputError if it cannot compute the same."""
    if (layers, dim) == (old.layers, old.dim):
        raise InputError(f"say what grows beyond --layers={layers} and --dim={dim}")
    if layers < old.layers:
        raise InputError(f"--layers={layers} must be at least the model's {old.layers}")
    if dim < old.dim or dim % old.dim:
        raise InputError(
            f"--dim={dim} must be a multiple of the model's {old.dim}: it repeats them"
        )
    legacy = old.branch == "legacy" and old.architecture in ("hybrid", "rwkv6")
    if layers > old.layers and legacy and old.legacy_wkv != "c":
        raise InputError(
            f"--layers={layers} must be {old.layers} for model.branch='legacy', whose output "
            "contains its input, so that no new block can add nothing"
        )
    if layers > old.layers and old.architecture == "hybrid" and old.residual != "none":
        raise InputError(
            f"--layers={layers} must be {old.layers} for model.residual={old.residual!r}, whose "
            "branches add their input, so that no new block can add nothing"
        )
    times = dim // old.dim
    groups = old.mamba_groups * (times if old.mamba_groups > 1 else 1)
    mix, decay = rwkv6.ranks(old)  # which the wider model would else choose by its width
    return dataclasses.replace(
        old,
        layers=layers,
        dim=dim,
        heads=old.heads * times,
        mamba_groups=groups,
        **rwkv6.rank_fields(mix, decay, dim),
    )


def _widen(weights, old: ModelConfig, new: ModelConfig, rng) -> dict[str, np.ndarray]:
    """Parameters of `new`, which is `old` with a multiple of its width."""
    times, shapes = new.dim // old.dim, params.shapes_of(new)
    growing = {}  # path -> [(axis, the sections along it)]
    for path, x in weights.items():
        axes = [axis for axis in range(x.ndim) if x.shape[axis] != shapes[path][axis]]
        growing[path] = [(axis, _sections(path, x.shape[axis], old)) for axis in axes]
        for axis, sections in growing[path]:
            wider = sum(size * (times if grows else 1) for size, grows in sections)
            if wider != shapes[path][axis]:
                raise InputError(
                    f"--dim={new.dim} cannot keep the function: {path} {list(x.shape)} would have "
                    f"to be {list(shapes[path])}, which is not {times} times as wide"
                )
    wide = {}
    for path, x in weights.items():
        for axis, sections in reversed(growing[path]):  # outputs first: each has shares of its own
            x = _copy(x, axis, sections, times, _sums(path, axis), rng)
        wide[path] = x
    if old.tie_embeddings:  # the head sums over copies and cannot divide: it is the embedding
        wide |= {path: wide[path] / times for path in wide if path.startswith("final_norm/")}
    return wide


def _sums(path: str, axis: int) -> bool:
    """Whether a parameter's axis is summed over, as the input axis of a matrix is."""
    return axis == 0 and re.search(r"(kernel|head|_w1)$", path) is not None


def _sections(path: str, size: int, c: ModelConfig) -> list[tuple[int, bool]]:
    """The sections along an axis that grows: the size of each, and whether it grows."""
    # Mamba's B and C. One group of all heads stays one; several are copied with their heads.
    per_group = [(c.mamba_groups * c.state_size, c.mamba_groups > 1)] * 2
    if path.endswith("/in_proj/kernel") and size != c.dim:
        inner = (c.mamba_dim, True)
        return [inner, inner, *per_group, (c.mamba_heads, True)]
    if "/conv1d/" in path:
        return [(c.mamba_dim, True), *per_group]
    if ("/fusion/" in path or "/qkv/" in path) and size % c.dim == 0:
        return [(c.dim, True)] * (size // c.dim)
    return [(size, True)]


def _copy(x, axis, sections, times, summed, rng):
    """`times` copies of the sections that grow, along `axis`; if summed, each has a share."""
    bounds = np.cumsum([size for size, _ in sections])[:-1]
    parts = []
    for part, (_, grows) in zip(np.split(x, bounds, axis), sections):
        copies = np.stack([part] * (times if grows else 1))
        if summed and grows:
            noise = rng.standard_normal(copies.shape, np.float32) * np.sqrt(np.square(part).mean())
            copies = (copies + noise - noise.mean(0)) / times
        parts += list(copies)
    return np.concatenate(parts, axis)
