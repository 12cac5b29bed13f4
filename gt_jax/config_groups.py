"""The settings of a run in their groups: each with its type, default, range and meaning, once.

gt_jax.config joins them, with those of the model and of a hybrid's branches, and checks what they
say together.
"""

import re
from dataclasses import dataclass

from gt_jax.config_hybrid import PartSteps
from gt_jax.settings import (
    ABOVE_ZERO,
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Range,
    setting,
)
from gt_jax.thresholds import STOP_RULES, split_rules


@dataclass(frozen=True)
class Data:
    """data.*: the text, its tokens, and their order."""

    source: str = setting(
        "shakespeare",
        "shakespeare, shakespeare-all, a file, a folder, tfds:NAME, a folder that"
        " `python -m gt_jax.prepare` made, or several of these as DIR:WEIGHT,DIR:WEIGHT",
    )
    validation_source: str = setting(
        "", "another source that validates; empty: data.source has a part that does"
    )
    field: str = setting("text", "the text field of JSONL lines and TFDS examples")
    tokenizer: str = setting(
        "char",
        "char, char97 (32 reserved ids first), sentencepiece, or a file: tokenizer.json,"
        " SentencePiece .model, RWKV vocabulary; prepared folders bring their own",
    )
    vocab_size: int = setting(4096, "of a SentencePiece tokenizer; characters need none", POSITIVE)
    order: str = setting(
        "windows",
        "shuffled windows, or tracks that continue from batch to batch",
        choices=("windows", "tracks"),
    )
    split: str = setting(
        "contiguous",
        "the last part of the text validates; tracks: the last part of each track",
        choices=("contiguous", "tracks"),
    )
    validation_fraction: float = setting(
        0.1, "of the text; data sets with their own split keep it", FRACTION
    )


@dataclass(frozen=True)
class Multipliers:
    """optim.lr_multipliers.*: by part of the model."""

    rwkv: float = setting(1.0, "of the RWKV branches", NOT_NEGATIVE)
    mamba: float = setting(1.0, "of the Mamba branches", NOT_NEGATIVE)
    gate: float = setting(1.0, "of the fusions", NOT_NEGATIVE)


@dataclass(frozen=True)
class Optim:
    """optim.*: the optimizer, its schedule, averaging, clipping and accumulation."""

    name: str = setting(
        "adamw",
        "muon is for the blocks' projections and leaves the rest to AdamW; schedule_free is AdamW"
        " with an average in place of a falling rate",
        choices=("adamw", "muon", "schedule_free"),
    )
    lr: float = setting(
        4e-3,
        "peak learning rate; the best of a sweep for gf_mh with AdamW. Updates of Muon have the"
        " size of AdamW's",
        ABOVE_ZERO,
    )
    schedule: str = setting(
        "cosine",
        "how the rate falls after the warm-up; wsd: not before the last decay_steps",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    min_lr_ratio: float = setting(0.1, "the rate ends at this share of the peak", SHARE)
    warmup_steps: int = setting(50, "linear; step 0 already moves", NOT_NEGATIVE)
    decay_steps: int = setting(
        0, "last steps of wsd, in which the rate falls; 0 for a fifth of all", NOT_NEGATIVE
    )
    weight_decay: float = setting(
        0.1, "on weight matrices alone, never on embeddings, gates or decays", NOT_NEGATIVE
    )
    b1: float = setting(
        0.9, "decay of the mean of gradients; schedule_free: share of the average", BELOW_ONE
    )
    b2: float = setting(0.95, "decay of the mean of their squares", BELOW_ONE)
    eps: float = setting(1e-8, "added to the root of that mean", ABOVE_ZERO)
    muon_momentum: float = setting(0.95, "decay of Muon's mean of gradients", BELOW_ONE)
    moments_dtype: str = setting(
        "float32", "of the means of gradients and squares", choices=("float32", "bfloat16")
    )
    ema: float = setting(
        0.0,
        "decay of a mean of the parameters, which is what is evaluated, saved and exported; 0 for"
        " none",
        BELOW_ONE,
    )
    clip: float = setting(1.0, "global gradient norm; 0 turns clipping off", NOT_NEGATIVE)
    lr_multipliers: Multipliers = setting(Multipliers, "of the learning rate, by part of the model")
    mamba_grad_scale: float = setting(
        1.0, "of the Mamba branches' gradients, before clipping; Adam divides it out", ABOVE_ZERO
    )
    part_warmup_steps: PartSteps = setting(
        PartSteps, "a longer warm-up of a part, to the same peak; 0: warmup_steps"
    )
    frozen_steps: PartSteps = setting(PartSteps, "first updates that leave a part as it is")
    grad_accumulation: int = setting(
        1, "microbatches per step; the gradient stays the full batch's", POSITIVE
    )


def _is_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


@dataclass(frozen=True)
class Lora:
    """train.lora.*: the adapters of train.tune=lora."""

    rank: int = setting(8, "of each matrix's update", POSITIVE)
    alpha: float = setting(
        16.0, "the update is alpha / rank times the adapters' product", ABOVE_ZERO
    )
    matrices: str = setting(
        r"(rwkv|mamba|attention|ffn)(_2)?/.*kernel$",
        "a regular expression, searched for in the paths of matrices, such as"
        " blocks_0/rwkv/key/kernel; by default the mixers' projections and the feed-forward",
        Range(_is_expression, "a regular expression"),
    )


@dataclass(frozen=True)
class Train:
    """train.*: length, batches, evaluation, samples."""

    steps: int = setting(500, "batches to learn from", POSITIVE)
    tune: str = setting(
        "none",
        "trains a part of model.init_from, all else frozen: state, what each RWKV-6 and Mamba-2"
        " recurrence begins a document with (model.learned_states); lora, low-rank updates of its"
        " matrices (train.lora); none: the whole model",
        choices=("none", "state", "lora"),
    )
    lora: Lora = setting(Lora, "low-rank updates, of train.tune=lora")
    max_minutes: float = setting(
        0.0, "stop after so long, for the same command to continue; 0 for no limit", NOT_NEGATIVE
    )
    batch_size: int = setting(64, "rows per step over all devices and microbatches", POSITIVE)
    seq_len: int = setting(64, "tokens per row", Range(lambda v: v >= 2, "at least 2"))
    carry_state: bool = setting(
        False, "begin each row with the state the last batch ended in (needs data.order=tracks)"
    )
    rwkv_dropout_start: float = setting(
        0.0, "chance that a block drops its RWKV branch, at step 0", BELOW_ONE
    )
    rwkv_dropout_end: float = setting(0.0, "at the last step; linear in between", BELOW_ONE)
    eval_every: int = setting(
        100, "steps between evaluations; 0 for none before the end", NOT_NEGATIVE
    )
    eval_at_start: bool = setting(
        False,
        "also evaluate before the first step, which is never the best",
    )
    eval_tokens: int = setting(
        0, "validation tokens per evaluation; 0 for the whole split", NOT_NEGATIVE
    )
    patience: int = setting(
        0, "stop after so many evaluations without a new best; 0 for never", NOT_NEGATIVE
    )
    stop_rules: str = setting(
        "",
        "what else ends a run, with commas between: "
        + "; ".join(f"{name}: {when}" for name, when in STOP_RULES.items()),
        Range(
            lambda v: set(split_rules(v)) <= set(STOP_RULES),
            f"empty, or of {', '.join(STOP_RULES)} with commas between",
        ),
    )
    max_nonfinite: int = setting(
        10, "stop after so many NaN or infinite steps in a row (each is skipped)", POSITIVE
    )
    rewind_mads: float = setting(
        0.0,
        "return to the last checkpoint before a spike of the loss and skip the data: how many"
        " median absolute deviations above the median of the last 100 steps are one; 0 for never",
        NOT_NEGATIVE,
    )
    rewind_steps: int = setting(
        5, "steps in a row above that, or not finite, for a spike", POSITIVE
    )
    rewind_most: int = setting(3, "returns of a run at most", POSITIVE)
    sample_every: int = setting(0, "steps between text samples; 0 for one at the end", NOT_NEGATIVE)
    sample_prompt: str = setting(
        "", "what a sample continues; empty: the start of the validation text"
    )
    sample_tokens: int = setting(256, "length of a sample; 0 for none at all", NOT_NEGATIVE)


@dataclass(frozen=True)
class Checkpoint:
    """checkpoint.*: when to save, and how many to keep."""

    every: int = setting(
        250, "steps; the best and the last are saved in any case; 0 for only those", NOT_NEGATIVE
    )
    keep: int = setting(2, "latest checkpoints kept, besides the best", POSITIVE)
    keep_every: int = setting(
        0, "steps between checkpoints that are kept for good; 0 for none", NOT_NEGATIVE
    )


@dataclass(frozen=True)
class Parallel:
    """parallel.*: how devices share a batch."""

    mode: str = setting(
        "jit", "over a device mesh, or pmap; both compute the same", choices=("jit", "pmap")
    )
    fsdp: int = setting(
        1, "devices that share large parameters, their moments and gradients", POSITIVE
    )
    sequence: int = setting(
        1, "devices that share each row, train.seq_len / sequence tokens each", POSITIVE
    )
    coordinator_address: str = setting(
        "",
        "HOST:PORT of process 0 where several processes train together; auto: of a cluster that JAX"
        " detects (SLURM, Open MPI, Kubernetes, cloud TPUs); empty: the environment's"
        " JAX_COORDINATOR_ADDRESS, else one process",
    )
    num_processes: int = setting(
        0, "processes that train together; 0: the environment's JAX_NUM_PROCESSES", NOT_NEGATIVE
    )
    process_id: int = setting(
        -1,
        "number of this process, from 0; -1: the environment's JAX_PROCESS_ID",
        Range(lambda v: v >= -1, "-1 or more"),
    )
    host_timeout: float = setting(
        300.0,
        "seconds to wait until all processes are there, and later for one that is silent",
        Range(lambda v: v >= 1, "at least 1"),
    )


@dataclass(frozen=True)
class Log:
    """log.*: what a run records."""

    every: int = setting(10, "steps between lines of metrics.jsonl and of the screen", POSITIVE)
    activations: bool = setting(
        False,
        "also variances of activations, entropy of the output and norms of the states, of a few"
        " rows; costs a forward pass over them at every line",
    )
    tensorboard: bool = setting(True, "also write event files under tensorboard/")
    wandb: bool = setting(False, "also log to Weights & Biases; WANDB_MODE=offline keeps it here")
    trackio: bool = setting(False, "also log to trackio, on this machine unless it is told where")
    project: str = setting("gt_jax", "where wandb and trackio collect runs")
