"""One training step and one evaluation step, as plain functions of (state, batch).

    loss = - 1/n * sum over counted targets of log p(target),   n = targets >= 0 in the whole batch

Gradients are of this loss exactly, however the batch is cut into microbatches or spread over
devices: each part divides its sum by the whole batch's n, and parts add up.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gt_jax.config import Config
from gt_jax.models import LanguageModel
from gt_jax.training import optimizer


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. A pytree; `carry` rows follow the batch, the rest is one copy."""

    step: jax.Array  # [] int32, batches seen
    rng: jax.Array  # [2] uint32, data of the run's random key; never advanced, only folded
    params: Any  # float32
    opt_state: Any
    carry: Any  # recurrent state at the end of the last batch, leaves [B, ...], or None
    skipped: jax.Array  # [] int32, steps without an update because of a non-finite loss or gradient
    skipped_in_a_row: jax.Array  # [] int32
    average: Any = None  # mean of the parameters where optim.ema is set

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate, sample from and export."""
        return optimizer.evaluated(self.params, self.opt_state, self.average)


class Evaluation(NamedTuple):
    """Sums over one batch's counted targets."""

    loss: jax.Array  # [] float32, nats
    tokens: jax.Array  # [] int32


def init_state(
    model: LanguageModel, tx: optax.GradientTransformationExtraArgs, config: Config, key: jax.Array
) -> TrainState:
    """A fresh TrainState: parameters from the random key, zero carried state if there is one.

    Under jit the key must be an argument: XLA spends minutes folding parameters that are constants.
    """
    tokens = jnp.zeros((1, min(config.train.seq_len, 16)), jnp.int32)
    params = model.init(jax.random.fold_in(key, 0), tokens)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(jax.random.fold_in(key, 1)),
        **_of_params(params, tx, config),
        carry=model.init_state(config.train.batch_size) if config.train.carry_state else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def start_from(
    state: TrainState, params: Any, tx: optax.GradientTransformationExtraArgs, config: Config
) -> TrainState:
    """A fresh TrainState with other parameters."""
    return dataclasses.replace(state, **_of_params(params, tx, config))


def _of_params(params, tx, config: Config) -> dict:
    """The fields of a fresh TrainState that depend on its parameters."""
    average = jax.tree.map(jnp.copy, params) if config.optim.ema else None
    return {"params": params, "opt_state": tx.init(params), "average": average}


def make_train_step(
    model: LanguageModel,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    config: Config,
    axis_name: str | None = None,
) -> Callable:
    """train_step(state, batch) -> (state, metrics).

    Args:
        model: a gt_jax.models module.
        tx: from `optimizer.make_optimizer`, and `schedule` its learning rate by update.
        config: uses optim.grad_accumulation, optim.clip, train.steps and train.rwkv_dropout_*.
        axis_name: of the devices under shard_map or pmap: sums over it make the result the whole
            batch's.

    Returns:
        A function to jit, shard_map or pmap. Its metrics are scalars: loss (nats per token),
        grad_norm (before clipping), grad_norm_rwkv, ..., r_m_ratio (RWKV's over Mamba's gradient
        norm), lr, tokens, skipped, skipped_in_a_row; and gate [layers], the mean gate of each block
        that has one.
    """
    microbatches = config.optim.grad_accumulation
    dropout = (config.train.rwkv_dropout_start, config.train.rwkv_dropout_end)

    def over_devices(reduce, tree):
        return reduce(tree, axis_name) if axis_name else tree

    def train_step(state: TrainState, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        drop = None
        if any(dropout):
            drop = dropout[0] + (dropout[1] - dropout[0]) * state.step / config.train.steps
        tokens = over_devices(jax.lax.psum, jnp.sum(batch.targets >= 0))

        def loss_of(params, index, batch, carry):
            output, sown = model.apply(
                {"params": params},
                batch.inputs,
                batch.targets,
                _zero_rows(carry, batch.fresh),
                segment_ids=batch.segment_ids,
                rwkv_drop=drop,
                rngs={"dropout": jax.random.fold_in(key, index)},
                mutable=["activations"],
                method="loss",
            )
            loss = output.nats / jnp.maximum(tokens, 1)
            return loss, (mean_gates(sown), None if carry is None else output.state)

        def add_microbatch(grads, part):
            (loss, aux), more = jax.value_and_grad(loss_of, has_aux=True)(state.params, *part)
            return jax.tree.map(jnp.add, grads, more), (loss, *aux)

        grads, (losses, gates, carry) = jax.lax.scan(
            add_microbatch,
            jax.tree.map(jnp.zeros_like, state.params),
            (jnp.arange(microbatches), *_split((batch, state.carry), microbatches)),
            unroll=microbatches == 1,
        )
        loss, grads = over_devices(jax.lax.psum, (losses.sum(), grads))
        grads = optimizer.join(grads)
        norms = optimizer.norms(grads)
        grad_norm = optax.tree.norm(norms)
        grads = optimizer.clip(grads, grad_norm, config.optim.clip)

        # A step that is not finite leaves no trace but its count, the carried state included.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, finite=finite)
        params = optax.apply_updates(state.params, updates)
        average, decay = state.average, config.optim.ema
        if average is not None:
            count = state.step - state.skipped + 1
            moved = optimizer.update_average(average, params, decay, count)
            average = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, average)
        carry = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), _join(carry), state.carry
        )
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            average=average,
            carry=carry,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": schedule(state.step - state.skipped),
            "tokens": tokens,
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        metrics |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        if "rwkv" in norms and "mamba" in norms:
            metrics["r_m_ratio"] = norms["rwkv"] / norms["mamba"]
        if gates is not None:
            metrics["gate"] = over_devices(jax.lax.pmean, gates.mean(0))  # [layers]
        return new_state, metrics

    return train_step


def make_eval_step(model: LanguageModel) -> Callable:
    """eval_step(params, batch, carry) -> (Evaluation, carry); no carry: rows start from zero."""

    def eval_step(params, batch, carry):
        found: Any = model.apply(
            {"params": params},
            batch.inputs,
            batch.targets,
            _zero_rows(carry, batch.fresh),
            segment_ids=batch.segment_ids,
            method="loss",
        )
        sums = Evaluation(found.nats, jnp.sum(batch.targets >= 0))
        return sums, None if carry is None else found.state

    return eval_step


def mean_gates(sown: Any) -> jax.Array | None:
    """[layers] float32 mean gate of each block in depth order, None where no block has a gate."""
    gates = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
        pieces = [str(getattr(key, "key", "")) for key in path]
        if "gate" in pieces:
            block = next(piece for piece in pieces if piece.startswith("blocks_"))
            gates[int(block.removeprefix("blocks_"))] = jnp.mean(leaf, dtype=jnp.float32)
    return jnp.stack([gates[layer] for layer in sorted(gates)]) if gates else None


def summed_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Summed cross-entropy, [] float32 nats.

    Args:
        logits: [..., vocabulary] float32.
        targets: [...] int32; below 0 they do not count.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.sum(losses, where=targets >= 0)


def _zero_rows(carry, fresh):
    """The carried state with the rows that start anew set to zero; no gradient crosses batches."""

    def zero(x):
        return jnp.where(fresh.reshape(-1, *[1] * (x.ndim - 1)), 0, jax.lax.stop_gradient(x))

    return jax.tree.map(zero, carry)


def _split(tree, parts: int):
    """[B, ...] -> [parts, B / parts, ...]; strided, so that rows stay on their devices."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree
    )


def _join(tree):
    """Undo _split."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)
