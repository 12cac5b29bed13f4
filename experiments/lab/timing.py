"""Programs ready to be timed: the trainer's own step and the generation engine's own loop."""

import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.programs import LOWERING
from gt_jax.data import make_batches
from gt_jax.generation import Request, prefill, slots
from gt_jax.generation.weights import prepare_weights
from gt_jax.models import make_model
from gt_jax.training import parallel
from gt_jax.training.model import make_model_config, takes_kernels
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.prefetch import prefetch
from gt_jax.training.step import init_state, make_train_step

ENDLESS = 2**30  # tokens asked for


def trainer_of(config, vocab):
    """(model, learning rate by update, optimizer, random key -> TrainState) of a run."""
    model = make_model(make_model_config(config, vocab))
    schedule = make_schedule(config.optim, config.train.steps)
    tx = make_optimizer(config.optim, schedule)
    return model, schedule, tx, functools.partial(init_state, model, tx, config)


def random_batches(vocab, rows, length):
    """Endless batches of random tokens, the same in every call."""
    tokens = np.random.default_rng(0).integers(vocab, size=4 * rows * length + 1, dtype=np.int32)
    return make_batches((tokens,), order="windows", batch_size=rows, seq_len=length)


class Trainer:
    """The trainer's own step on random tokens, ready to be timed."""

    def __init__(self, config, vocab, devices=None, on_lowered=lambda trainer, lowered: None):
        """Lower and compile the step.

        Args:
            config: of the run. vocab: number of token ids. devices: all if None.
            on_lowered: called in between, with this and what is lowered.
        """
        share = config.parallel
        self.mesh = parallel.make_mesh(share.fsdp, share.sequence, devices)
        self.model, schedule, tx, self.init = trainer_of(config, vocab)
        self.shapes = jax.eval_shape(self.init, jax.random.key(0))
        self.shardings = parallel.state_sharding(self.mesh, self.shapes)
        B, T = config.train.batch_size, config.train.seq_len
        self.vocab = vocab
        self.read = functools.partial(random_batches, vocab, B, T)
        self.state = None  # until it runs, so that it holds no memory before

        began = time.perf_counter()
        make_step = functools.partial(make_train_step, self.model, tx, schedule, config)
        train_step = parallel.compile_train_step(
            make_step,
            self.mesh,
            "jit",
            self.shapes,
            activation=B * T * self.model.config.dim,
            kernels=takes_kernels(self.model.config),
        )
        batch = next(self.read())
        with LOWERING:
            lowered = train_step.lower(
                parallel.shapes_on(self.shardings, self.shapes),
                parallel.shapes_on(parallel.batch_shardings(batch, self.mesh), batch),
            )
        on_lowered(self, lowered)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began

    def restart(self, state=None):
        """Back to the first batch, with a TrainState or, if None, random parameters."""
        self.state = state
        if state is None:
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes)
            state = zeros.replace(params=random_params(self.model))
            self.state = jax.device_put(state, self.shardings)
        self.feed = prefetch(self.read(), self.mesh, "jit")

    def losses(self, steps):
        """Of so many steps, float each."""
        found = []
        for _ in range(steps):
            batch, _ = next(self.feed)
            self.state, metrics = self.compiled(self.state, batch)
            found.append(float(metrics["loss"]))
        return found

    def run(self, steps):
        """Seconds of so many steps."""
        if self.state is None:
            self.restart()
        began = time.perf_counter()
        for _ in range(steps):
            batch, _ = next(self.feed)
            self.state, metrics = self.compiled(self.state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began


class Decoder:
    """The engine's loop on a batch that never ends, ready to be timed."""

    def __init__(self, model, params, batch, context=None):
        """Args: context: what every row continues; nothing but token 0 if None."""
        rows = slots.rows_of_batch(batch)
        began = time.perf_counter()
        self.weights = prepare_weights(model, params, rows)
        self.slots = slots.empty_slots(model, params, rows)
        context = prefill(model, params, [0]) if context is None else context
        for row in range(batch):
            request = Request(context, max_tokens=ENDLESS, seed=row)
            self.slots = slots.fill_slot(self.slots, row, slots.one_slot(request, context))
        self.advance = functools.partial(slots.advance, model, self.weights, narrows=False)
        self.run(1)
        self.compile_seconds = time.perf_counter() - began
        self.run(2)

    def run(self, bursts):
        """Seconds per step over so many bursts."""
        began = time.perf_counter()
        for _ in range(bursts):
            self.slots, drawn = self.advance(self.slots)
            jax.device_get(drawn)
        return (time.perf_counter() - began) / (bursts * slots.BURST)


def random_params(model):
    """Parameters of the model's shapes from N(0, 0.02): drawn on the host, sooner than its init."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    draw = lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))
    return jax.tree.map(draw, shapes)


def timings(function, sets, effort):
    """ms of a call of function(*set), of each stretch of many calls."""
    turns = itertools.cycle(sets)

    def stretch(calls):
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*next(turns))
        jax.block_until_ready(result)
        return 1e3 * (time.perf_counter() - began) / calls

    stretch(len(sets))  # compiles and warms up
    calls = max(effort["least_calls"], round(1e3 * effort["seconds"] / stretch(3)))
    return [stretch(calls) for _ in range(effort["repeats"])]


def copy_bandwidth(effort):
    """Bytes read and written per second by the fastest of several large copies."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**30
    return 2e3 * size / min(timings(jax.jit(jnp.copy), [(jnp.ones(size, jnp.int8),)], effort))


def spread(values):
    """Median and range in the form of an estimate; one value has no range."""
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    found = {"mean": statistics.median(values), "low": low, "high": high}
    return found | {"n": len(values), "values": values}


def total_bytes(tree):
    return sum(z.size * z.dtype.itemsize for z in jax.tree.leaves(tree))
