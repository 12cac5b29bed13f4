"""The setting that a misspelt name, or the name in another trainer, stands for."""

from collections.abc import Collection

from gt_jax.errors import did_you_mean

# What other trainers call these fields.
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "lr_min": "optim.min_lr_ratio",
    "min_lr": "optim.min_lr_ratio",
    "warmup": "optim.warmup_steps",
    "beta1": "optim.b1",
    "beta2": "optim.b2",
    "epsilon": "optim.eps",
    "grad_clip": "optim.clip",
    "max_grad_norm": "optim.clip",
    "gradient_accumulation_steps": "optim.grad_accumulation",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "max_iters": "train.steps",
    "max_seq_len": "train.seq_len",
    "sequence_length": "train.seq_len",
    "context_length": "train.seq_len",
    "block_size": "train.seq_len",
    "bs": "train.batch_size",
    "eval_interval": "train.eval_every",
    "log_interval": "log.every",
    "log_every": "log.every",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "n_layer": "model.layers",
    "n_layers": "model.layers",
    "num_layers": "model.layers",
    "n_embd": "model.dim",
    "d_model": "model.dim",
    "hidden_size": "model.dim",
    "n_head": "model.heads",
    "num_heads": "model.heads",
    "d_state": "model.state_size",
    "lora_r": "train.lora.rank",
    "lora_rank": "train.lora.rank",
    "lora_alpha": "train.lora.alpha",
    "target_modules": "train.lora.matrices",
    "dataset": "data.source",
    "model": "model.preset",
}


def suggest_field(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown field, `; did you mean 'optim.lr'?` or "".

    Args:
        name: what was written, with or without its group.
        known: the names of all fields, with their groups.
    """
    group, _, last = name.rpartition(".")
    same = ELSEWHERE.get(last.lower().replace("-", "_"))
    if same is not None and same in known:
        return f"; did you mean {same!r}?"
    ends = [field for field in known if field.rpartition(".")[2] == last]
    if ends:  # the right name in another group, or without one
        return f"; did you mean {ends[0]!r}?"
    if group:
        return did_you_mean(name, known)
    lasts = {field.rpartition(".")[2]: field for field in reversed(list(known))}
    close = did_you_mean(name, lasts)
    return f"; did you mean {lasts[close.split(chr(39))[1]]!r}?" if close else ""
