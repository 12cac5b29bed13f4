"""A hybrid out of two models: the time-mix of an RWKV-6, the mixer of a Mamba-2, a gate between.

A hybrid has one norm for both branches. So each branch's matrices take over the scale of the norm
that stood before it, and the branch reads the same input as before. A hybrid has no place for three
parts of an official RWKV-6, which are dropped: the biases of the norms, the subtraction of means
and the feed-forward.
"""

import dataclasses
from pathlib import Path

import numpy as np

from gt_jax.convert import files, params
from gt_jax.errors import InputError
from gt_jax.models import ModelConfig, count_parameters, make_model

# The first matrices that a branch's normalised input reaches. Before them, every operation acts on
# each channel alone, so a scale may move past it.
READERS = {
    "rwkv": (
        *(f"/{name}/kernel" for name in ("receptance", "key", "value", "gate")),
        *("/time_maa_w1", "/time_decay_w1"),
    ),
    "mamba": ("/in_proj/kernel",),
}
REST = ("rwkv", "mamba", "new")


def graft(
    rwkv: str | Path,
    mamba: str | Path,
    target: str | Path,
    *,
    fusion: str = "gf",
    gate: float | None = None,
    rest: str = "mamba",
    seed: int = 0,
) -> str:
    """Write a hybrid of two models' branches as a folder for `gt_jax.load`.

    Args:
        rwkv: an official RWKV-6, as `gt_jax.load` takes it.
        mamba: a Mamba-2 of the same width, depth, vocabulary and tokenizer.
        target: folder to be made.
        fusion: a key of `gt_jax.models.fusion.FUSIONS`.
        gate: share of the RWKV branch, in (0, 1), equal for all inputs; None takes the default of
            the fusion.
        rest: whose embedding, head and final norm to take: "rwkv", "mamba", or "new" for random
            ones. Mamba-2's fit as they are. The feed-forwards are new and add nothing at first.
        seed: of the new parameters.

    Returns:
        A table of what came from where.

    Raises:
        InputError: the parents do not fit together, or an argument is none of the above. Nothing is
            written.
    """
    files.check_free(target)
    if rest not in REST:
        raise InputError(f"--rest={rest} must be one of {', '.join(REST)}")
    paths = {"rwkv": rwkv, "mamba": mamba}
    parents = {name: params.read(path) for name, path in paths.items()}
    config = _config(paths, parents, fusion, gate, rest)
    weights = params.new(config, seed, lambda path: _part(path) not in parents)
    for path in weights:
        if path.endswith("ffn/down/kernel"):
            weights[path] = np.zeros_like(weights[path])
    for name in parents:
        weights |= _branch(parents[name].params, name)
    if rest != "new":
        weights |= _ends(parents[rest].params, weights)
    params.write(target, params.Stored(config, weights, parents["rwkv"].tokenizer))
    return _table(config, paths, rest, target)


def _config(paths, parents, fusion, gate, rest) -> ModelConfig:
    """The hybrid's ModelConfig; InputError if there is none."""
    rwkv, mamba = (parents[name].config for name in ("rwkv", "mamba"))
    if (rwkv.architecture, rwkv.branch) != ("rwkv6", "official"):
        legacy = "legacy " if rwkv.branch == "legacy" else ""
        raise InputError(f"--rwkv={paths['rwkv']} holds a {legacy}{rwkv.architecture}, not rwkv6")
    if mamba.architecture != "mamba2":
        raise InputError(f"--mamba={paths['mamba']} holds a {mamba.architecture}, not mamba2")
    for field in ("dim", "layers", "vocab_size"):
        one, other = getattr(rwkv, field), getattr(mamba, field)
        if one != other:
            raise InputError(
                f"model.{field} must be the same in both parents: it is {one} in {paths['rwkv']} "
                f"and {other} in {paths['mamba']}"
            )
    one, other = (parents[name].tokenizer for name in ("rwkv", "mamba"))
    if one.to_dict() != other.to_dict():
        raise InputError(
            f"the parents' tokenizers differ: {one.kind} of {one.vocab_size} ids in "
            f"{paths['rwkv']} and another {other.kind} of {other.vocab_size} in {paths['mamba']}; "
            "train both on the same text"
        )
    if rest == "rwkv" and rwkv.segment_token is not None:
        raise InputError(
            f"--rest=rwkv cannot take the segment embedding of {paths['rwkv']} "
            f"(model.segment_token={rwkv.segment_token}), which RWKV-6 norms with its embedding; "
            "give --rest=mamba or --rest=new"
        )
    config = dataclasses.replace(
        mamba,
        architecture="hybrid",
        rwkv_carry=rwkv.rwkv_carry,
        learned_states=rwkv.learned_states or mamba.learned_states,
        segment_token=None if rest == "rwkv" else mamba.segment_token,
        heads=rwkv.heads,
        mix_rank=rwkv.mix_rank,
        decay_rank=rwkv.decay_rank,
        fusion=fusion,
        gate_init=gate,
        branch="official",
        init="official",
        # An RWKV-6 norms its embedding, so the embedding cannot serve as the head as well.
        tie_embeddings={"rwkv": False, "mamba": mamba.tie_embeddings, "new": True}[rest],
    )
    make_model(config)  # knows the fusions
    return config


def _part(path: str) -> str:
    """The part of a block that a parameter belongs to, or the empty string."""
    return path.split("/")[1] if path.startswith("blocks_") else ""


def _branch(weights, branch) -> dict[str, np.ndarray]:
    """A branch of every block, with the scale of the norm before it moved into its matrices."""
    taken = {path: x for path, x in weights.items() if _part(path) == branch}
    for path, x in taken.items():
        if path.endswith(READERS[branch]):
            scale = weights[f"{path.split('/')[0]}/mixer_norm/scale"]
            taken[path] = scale[:, None] * x
    return taken


def _ends(weights, hybrid) -> dict[str, np.ndarray]:
    """Embedding, head and final norm of a parent, where the hybrid has them."""
    embedding = weights["embedding/embedding"]
    taken = {
        "embedding/embedding": embedding,
        "final_norm/scale": weights["final_norm/scale"],
        "head": weights.get("head", embedding.T),
    }
    if "segment_embedding" in weights:
        taken["segment_embedding"] = weights["segment_embedding"]
    if (norm := "blocks_0/embedding_norm") + "/scale" in weights:  # store the embedding normed
        centred = embedding - embedding.mean(-1, keepdims=True)
        unit = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
        taken["embedding/embedding"] = unit * weights[f"{norm}/scale"] + weights[f"{norm}/bias"]
    return {path: x for path, x in taken.items() if path in hybrid}


def _table(config, paths, rest, target) -> str:
    """Where each part of the hybrid comes from, a line each."""
    counts = count_parameters(config)
    ends = "new" if rest == "new" else str(paths[rest])
    share = "" if config.gate_init is None else f", {100 * config.gate_init:g} % RWKV"
    origins = {
        "embedding": ends,
        "segment_embedding": ends,
        "head": ends,
        "rwkv": f"{paths['rwkv']}, with its norm's scale",
        "mamba": f"{paths['mamba']}, with its norm's scale",
        "fusion": f"new: {config.fusion}{share}",
        "ffn": "new, adds nothing at first",
        "norms": "new" if rest == "new" else f"the final one {paths[rest]}, the others new",
    }
    rows = [f"{part:10} {counts[part]:13,}  {origins[part]}" for part in origins if part in counts]
    return "\n".join([*rows, f"{'total':10} {counts['total']:13,}  {target}"])
