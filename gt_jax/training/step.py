"""One training step and one evaluation step, as plain functions of (state, batch).

    loss = - 1/n * sum over counted targets of log p(target),   n = targets >= 0 in the whole batch

Gradients are of this loss exactly, however the batch is cut into microbatches or spread over
devices: each part divides its sum by the whole batch's n, and parts add up.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gt_jax.config import Config
from gt_jax.models import LanguageModel, fsdp
from gt_jax.models.carry import start_documents
from gt_jax.training import debate, lora, optimizer, pace, tuning

# Numbers of one activation, tokens x width, that a CPU works on at once, about: its caches then
# hold what one operation leaves to the next. On two cores a step of configs/gf_mh.py in 8 parts
# takes 0.8 of the time of one in a single pass, and 202 MiB of temporaries instead of 1203 (JAX
# 0.10.2). Of fewer tokens than these, adding up gradients would show.
_CPU_NUMBERS, _CPU_TOKENS = 2**16, 512


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. A pytree; `carry` rows follow the batch, the rest is one copy."""

    step: jax.Array  # [] int32, batches seen
    rng: jax.Array  # [2] uint32, data of the run's random key; never advanced, only folded
    params: Any  # float32; adapters beside them where train.tune=lora
    opt_state: Any
    carry: Any  # recurrent state at the end of the last batch, leaves [B, ...], or None
    skipped: jax.Array  # [] int32, steps without an update because of a non-finite loss or gradient
    skipped_in_a_row: jax.Array  # [] int32
    average: Any = None  # mean of the trained parameters where optim.ema is set

    @property
    def averaged(self) -> Any:
        """Like params, with the average in the places of what is averaged."""
        return optimizer.evaluated(self.params, self.opt_state, self.average)

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate, sample from and export: those of a model, averaged."""
        return lora.merged(self.averaged)


class Evaluation(NamedTuple):
    """Sums over one batch's counted targets."""

    loss: jax.Array  # [] float32, nats
    tokens: jax.Array  # [] int32


def init_state(
    model: LanguageModel, tx: optax.GradientTransformationExtraArgs, config: Config, key: jax.Array
) -> TrainState:
    """A new TrainState: parameters from the random key, zero carried state if there is one.

    Under jit the key must be an argument: XLA spends minutes folding parameters that are constants.
    """
    tokens = jnp.zeros((1, min(config.train.seq_len, 16)), jnp.int32)
    params = model.init(jax.random.fold_in(key, 0), tokens)["params"]
    params = tuning.prepared(params, config.train, jax.random.fold_in(key, 2))
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
    """A new TrainState with other parameters."""
    return dataclasses.replace(state, **_of_params(params, tx, config))


def _of_params(params, tx, config: Config) -> dict:
    """The fields of a new TrainState that depend on its parameters."""
    part = tuning.trained(params, config.train.tune)
    average = jax.tree.map(jnp.copy, part) if config.optim.ema else None
    return {"params": params, "opt_state": tx.init(part), "average": average}


class Gradients(NamedTuple):
    """What a step finds on the whole batch, before it changes anything."""

    grads: Any  # of the objective, like the parameters that are trained
    loss: jax.Array  # [] float32, the task's, nats per counted token
    terms: dict[str, jax.Array]  # of the debate group, with their sum "objective"; may be empty
    gates: Any  # ([layers] mean, [layers] standard deviation over positions), or None
    carry: Any  # the state after the batch, or None
    tokens: jax.Array  # [] int32, counted targets


def make_gradients(
    model: LanguageModel, config: Config, axis_name: str | tuple[str, ...] | None = None
) -> Callable:
    """gradients(params, carry, batch, rng, step) -> Gradients.

    Args:
        model: a gt_jax.models module.
        config: uses optim.grad_accumulation, train.steps, train.tune, train.rwkv_dropout_* and
            debate. On a CPU a batch may be cut into more microbatches, see `_cuts`.
        axis_name: of the devices under shard_map or pmap, one or several: sums over them make the
            result the whole batch's.

    Raises:
        InputError: the debate group asks for what the model does not have.
    """
    dropout = (config.train.rwkv_dropout_start, config.train.rwkv_dropout_end)
    make_terms = debate.make_terms(model, config)

    def over_devices(reduce, tree):
        return reduce(tree, axis_name) if axis_name else tree

    def gradients(params, carry, batch, rng, step):
        key = jax.random.fold_in(jax.random.wrap_key_data(rng), step)
        drop = None
        if any(dropout):
            drop = dropout[0] + (dropout[1] - dropout[0]) * step / config.train.steps
        tokens = over_devices(jax.lax.psum, jnp.sum(batch.targets >= 0))
        microbatches = config.optim.grad_accumulation
        if axis_name is None and drop is None:  # whose draws are of a microbatch
            microbatches *= _cuts(batch.inputs.shape, microbatches, model.config.dim)

        part = tuning.trained(params, config.train.tune)

        def loss_of(part, index, batch, carry):
            whole = fsdp.gather_outside_blocks(lora.merged(tuning.joined(part, params)))
            output, sown = model.apply(
                {"params": whole},
                batch.inputs,
                batch.targets,
                start_documents(model.config, whole, jax.lax.stop_gradient(carry), batch.resets),
                segment_ids=batch.segment_ids,
                rwkv_drop=drop,
                rngs={"dropout": jax.random.fold_in(key, index)},
                mutable=["activations"],
                method="loss",
            )
            loss = objective = output.nats / jnp.maximum(tokens, 1)
            terms = {}
            if make_terms is not None:
                sums = make_terms(whole, sown, batch.targets)
                terms = {name: x / jnp.maximum(tokens, 1) for name, x in sums.items()}
                extra = debate.weighted(config.debate, step, config.train.steps, terms)
                objective = loss + extra
                terms = {f"debate_{name}": x for name, x in terms.items()}
                terms["objective"] = objective
            carry = None if carry is None else output.state
            return objective, (loss, terms, gate_moments(sown), carry)

        def add_microbatch(grads, rows):
            (_, aux), more = jax.value_and_grad(loss_of, has_aux=True)(part, *rows)
            return jax.tree.map(jnp.add, grads, more), aux

        grads, (losses, terms, gates, carry) = jax.lax.scan(
            add_microbatch,
            jax.tree.map(jnp.zeros_like, part),
            (jnp.arange(microbatches), *_split((batch, carry), microbatches)),
            unroll=microbatches == 1,
        )
        terms = jax.tree.map(jnp.sum, terms)
        loss, terms = over_devices(jax.lax.psum, (losses.sum(), terms))
        grads = over_devices(fsdp.sum_gradients, grads)
        if gates is not None:
            means, variances = gates.swapaxes(0, 1)  # [microbatches, layers] each
            over_all = functools.partial(over_devices, jax.lax.pmean)
            mean = over_all(means.mean(0))
            between = jnp.square(means - mean).mean(0)
            gates = mean, jnp.sqrt(over_all(variances.mean(0) + between))
        return Gradients(grads, loss, terms, gates, _join(carry), tokens)

    return gradients


def make_train_step(
    model: LanguageModel,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    config: Config,
    axis_name: str | tuple[str, ...] | None = None,
    spread: Callable | None = None,
) -> Callable:
    """train_step(state, batch) -> (state, metrics).

    Args:
        model, config, axis_name: as for `make_gradients`; config also says how Mamba's gradients
            are scaled and what all are clipped to.
        tx: from `optimizer.make_optimizer`, and `schedule` its learning rate by update.
        spread: gradients -> the same over several devices, where not the whole step is spread.

    Raises:
        InputError: the debate group asks for what the model does not have.

    Returns:
        A function to jit or pmap. Its metrics are scalars: loss (the task's, nats per token; with
        terms of the debate group also objective, what is minimised, and debate_NAME), grad_norm
        (before clipping), grad_norm_rwkv, ..., r_m_ratio (RWKV's over Mamba's gradient norm), lr,
        tokens, skipped, skipped_in_a_row; and gate [layers], the mean gate of each block that has
        one, with gate_std [layers], its standard deviation over positions.
    """

    gradients = make_gradients(model, config, axis_name)
    if spread is not None:
        gradients = spread(gradients)

    def train_step(state: TrainState, batch):
        found = gradients(state.params, state.carry, batch, state.rng, state.step)
        grads = pace.scaled(optimizer.join(found.grads), config.optim)
        norms = optimizer.norms(grads, are_cut=spread is not None)
        grad_norm = optax.tree.norm(norms)
        grads = optimizer.clip(grads, grad_norm, config.optim.clip)

        # A step that is not finite leaves no trace but its count, the carried state included.
        finite = jnp.isfinite(found.loss) & jnp.isfinite(grad_norm)
        part = tuning.trained(state.params, config.train.tune)
        done = state.step - state.skipped
        updates, opt_state = tx.update(grads, state.opt_state, part, finite=finite, done=done)
        part = optax.apply_updates(part, updates)
        average, decay = state.average, config.optim.ema
        if average is not None:
            moved = optimizer.update_average(average, part, decay, done + 1)
            average = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, average)
        carry = jax.tree.map(lambda new, old: jnp.where(finite, new, old), found.carry, state.carry)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=tuning.joined(part, state.params),
            opt_state=opt_state,
            average=average,
            carry=carry,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = {
            "loss": found.loss,
            "grad_norm": grad_norm,
            "lr": schedule(done),
            "tokens": found.tokens,
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        metrics |= found.terms | {f"grad_norm_{name}": norm for name, norm in norms.items()}
        if "rwkv" in norms and "mamba" in norms:
            metrics["r_m_ratio"] = norms["rwkv"] / norms["mamba"]
        if found.gates is not None:
            metrics["gate"], metrics["gate_std"] = found.gates
        return new_state, metrics

    return train_step


def make_eval_step(model: LanguageModel) -> Callable:
    """eval_step(params, batch, carry) -> (Evaluation, carry); no carry: rows start from zero."""

    def eval_step(params, batch, carry):
        params = fsdp.gather_outside_blocks(params)
        found: Any = model.apply(
            {"params": params},
            batch.inputs,
            batch.targets,
            start_documents(model.config, params, carry, batch.resets),
            segment_ids=batch.segment_ids,
            method="loss",
        )
        sums = Evaluation(found.nats, jnp.sum(batch.targets >= 0))
        return sums, None if carry is None else found.state

    return eval_step


def gate_moments(sown: Any) -> jax.Array | None:
    """[2, layers] float32 of each block's gate in depth order, None where no block has one.

    First its mean; then the variance over positions of its mean over channels, NaN for a gate that
    is the same at every position.
    """
    gates = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
        names = [str(getattr(key, "key", "")) for key in path]
        if "gate" in names:
            block = next(name for name in names if name.startswith("blocks_"))
            gates[int(block.removeprefix("blocks_"))] = leaf
    if not gates:
        return None
    # All blocks at once: of each block alone they are four small kernels on a GPU.
    over_channels = [jnp.mean(gates[layer], axis=-1, dtype=jnp.float32) for layer in sorted(gates)]
    of_tokens = jnp.stack(over_channels)  # [layers, B, T], or [layers] of gates that never change
    axes = tuple(range(1, of_tokens.ndim))
    means = jnp.mean(of_tokens, axis=axes)
    variances = jnp.var(of_tokens, axis=axes) if axes else jnp.full_like(means, jnp.nan)
    return jnp.stack([means, variances])


def summed_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Summed cross-entropy, [] float32 nats.

    Args:
        logits: [..., vocabulary] float32.
        targets: [...] int32; below 0 they do not count.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.sum(losses, where=targets >= 0)


def _cuts(shape: tuple[int, int], microbatches: int, width: int) -> int:
    """Into how many parts of whole rows to cut each microbatch of a batch [B, T]; 1 off CPUs.

    Of all equal parts, those whose size is nearest to what a CPU works on at once, but no less than
    half of it: 67 rows have no other parts than 67.
    """
    rows, length = shape[0] // microbatches, shape[1]
    if jax.default_backend() != "cpu":
        return 1
    tokens = max(_CPU_NUMBERS // width, _CPU_TOKENS)
    size = lambda parts: rows // parts * length
    found = [n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or size(n) >= tokens / 2)]
    return min(found, key=lambda parts: abs(math.log(size(parts) / tokens)))


def _split(tree, parts: int):
    """[B, ...] -> [parts, B / parts, ...]; strided, so that rows stay on their devices."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree
    )


def _join(tree):
    """Undo _split."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)
