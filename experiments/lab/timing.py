"""Programs ready to be timed: the trainer's own step and the generation engine's own loop."""

import functools
import itertools
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
from gt_jax.training.model import make_model_config
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step

ENDLESS = 2**30  # tokens asked for


class Trainer:
    """The trainer's own step on random tokens, ready to be timed."""

    def __init__(self, config, vocab):
        """Args: config: of the run, on all devices. vocab: number of token ids."""
        mesh = parallel.make_mesh()
        self.model = make_model(make_model_config(config, vocab))
        schedule = make_schedule(config.optim, config.train.steps)
        tx = make_optimizer(config.optim, schedule)
        init = functools.partial(init_state, self.model, tx, config)
        zeros = jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, jax.random.key(0))
        )
        state = zeros.replace(params=random_params(self.model))
        self.state = jax.device_put(state, parallel.state_sharding(mesh))
        B, T = config.train.batch_size, config.train.seq_len
        tokens = np.random.default_rng(0).integers(vocab, size=4 * B * T + 1, dtype=np.int32)
        batches = make_batches((tokens,), order="windows", batch_size=B, seq_len=T)
        self.feed = parallel.prefetch(batches, mesh, "jit")

        began = time.perf_counter()
        make_step = functools.partial(make_train_step, self.model, tx, schedule, config)
        activation = B * T * self.model.config.dim
        train_step = parallel.compile_train_step(make_step, mesh, "jit", activation=activation)
        with LOWERING:
            lowered = train_step.lower(self.state, next(self.feed)[0])
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began

    def run(self, steps):
        """Seconds of so many steps."""
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


def total_bytes(tree):
    return sum(z.size * z.dtype.itemsize for z in jax.tree.leaves(tree))
