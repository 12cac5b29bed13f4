"""What do arbiters with a memory cost, can they learn to weigh, and do they lower a text's loss?

    python -m experiments arbiters --seeds=5

Every fusion of gt_jax.models.FUSIONS but those of questions/fusion.py, beside GF-MH:

    cost    parameters of a block's fusion, and its time alone on a batch of 8 rows of 64 to 1024
            tokens, forward and backward, beside GRU's
    weigh   the original's toy task: r = c N(0, 1), c from U(0.5, 2.5) by row, m = N(0, 1); RWKV's
            weight, averaged over a row of 64, should be var m / (var r + var m). What 200 steps of
            Adam at 1e-3 take off the error, means of the first and last 20 steps. A norm removes
            what is asked for: a fusion that normalises its inputs cannot see it
    text    width 128 and 8 blocks on characters for 2000 steps, each at the best of three rates

The search has trained all of these but GRU: --parts takes them from its results, --only=gru trains
the rest. experiments/results/arbiters.json has the `seconds` of all parts together.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import command, designs, results
from experiments.lab.programs import side_by_side
from experiments.lab.statistics import estimate
from experiments.lab.timing import timings
from gt_jax.models import FUSIONS, ModelConfig

KNOWN = ("hy", "gf", "ws", "rf", "cp", "hgf")  # questions/fusion.py has them
ARBITERS = tuple(name for name in FUSIONS if name not in KNOWN)
DESIGNS = {designs.BASE: {}} | {name: designs.fields(name) for name in ARBITERS}
LENGTHS = (64, 256, 1024)
ROWS, WIDTH = 8, 128
TOY_STEPS, TOY_LENGTH, ENDS = 200, 64, 20
EFFORT = {"least_calls": 5, "seconds": 0.2, "repeats": 5}


def main(argv=None):
    parser = command.parser("arbiters", __doc__)
    designs.add_flags(parser, steps=2000, seeds=5)
    options = command.parse(parser, argv)
    measures = measured_in(options.parts or ())
    if asked := designs.names_of(options, DESIGNS, few=2):  # GRU and all others in one process
        wanted = [n for n in ARBITERS if options.parts or n in asked]
        measures |= costs([n for n in wanted if f"toy error removed {n}" not in measures], options)
    lengths = sorted({int(key.split(" at ")[1]) for key in measures if key.startswith("ms ")})
    rows = [
        [name, *(measures[key] for key in keys)]
        for name in ARBITERS
        for keys in [cost_keys(name, lengths)]
        if keys[0] in measures
    ]
    columns = ["arbiter", "parameters", *(f"ms at {T}" for T in lengths), "toy error removed"]
    note = f"A fusion of width {WIDTH} alone, forward and backward, {ROWS} rows; 1 is all of it."
    designs.study(
        options,
        DESIGNS,
        title="Arbiters",
        measures=measures,
        tables=[results.table("Cost, and the toy task", columns, rows, note)] if rows else [],
    )


def cost_keys(name, lengths):
    """Measures of an arbiter alone."""
    times = (f"ms {name} at {T}" for T in lengths)
    return [f"parameters of a block {name}", *times, f"toy error removed {name}"]


def measured_in(parts):
    """What results of this question say of arbiters alone."""
    kinds = ("parameters of a block ", "ms ", "toy error removed ", "speed over GRU at ")
    every = [results.read(part)["measures"] for part in parts]
    return {k: v for each in every for k, v in each.items() if k.startswith(kinds)}


def costs(names, options):
    """The measures of arbiters alone: parameters, times, beside GRU's too, and the toy task."""
    width, _ = command.size(options, (WIDTH, 1))
    configs = {n: ModelConfig(vocab_size=2, dim=width, heads=1, fusion=n) for n in names}
    jobs = list(itertools.product(configs, (8,) if options.quick else LENGTHS))
    learn = lambda name: toy(configs[name], options.seeds, quick=options.quick)
    learnt = dict(zip(configs, side_by_side(learn, list(configs))))
    compiled = side_by_side(lambda job: ready(configs[job[0]], job[1], options.quick), jobs)
    effort = EFFORT | ({"seconds": 0.0, "repeats": 2} if options.quick else {})
    spent = {job: timings(*call, effort) for job, call in zip(jobs, compiled)}  # one after another
    measures = {f"parameters of a block {name}": parameters(c) for name, c in configs.items()}
    measures |= {f"toy error removed {name}": estimate(share) for name, share in learnt.items()}
    for (name, T), ms in spent.items():
        measures[f"ms {name} at {T}"] = estimate(ms)
        if "gru" in configs:
            times = np.mean(spent["gru", T]) / np.array(ms)
            measures[f"speed over GRU at {T} {name}"] = estimate(times)
    return measures


def parameters(config):
    """Number of a fusion's parameters."""
    shapes = jax.eval_shape(functools.partial(initial, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def initial(config, key):
    branch = jnp.zeros((1, 2, config.dim))
    return apply(config, None, branch, branch, key)


def apply(config, params, rwkv, mamba, key=None):
    """What a fusion says of branches [B, T, D], whose mean the block reads; params by a key."""
    module = FUSIONS[config.fusion](config)
    more = {"block_input": (rwkv + mamba) / 2} if getattr(module, "reads_input", False) else {}
    if params is None:
        return module.init(key, rwkv, mamba, **more)["params"]
    return module.apply({"params": params}, rwkv, mamba, **more, mutable=["activations"])


def ready(config, length, quick):
    """A compiled fusion, forward and backward, and inputs to time it with."""
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (ROWS, length, config.dim))
    inputs = [(draw(2 * i), draw(2 * i + 1)) for i in range(3)]
    params = jax.jit(functools.partial(initial, config))(jax.random.key(0))

    @lab.jit(quick)
    def gradients(rwkv, mamba):
        loss = lambda *given: jnp.sum(jnp.square(apply(config, *given)[0][0]))
        return jax.grad(loss, (0, 1, 2))(params, rwkv, mamba)

    jax.block_until_ready(gradients(*inputs[0]))
    return gradients, inputs


def toy(config, seeds, *, quick):
    """[seeds] share of the toy task's error that training removes; negative if it grows."""
    tx = optax.adam(1e-3)
    steps, ends = (6, 2) if quick else (TOY_STEPS, ENDS)

    def draw(key):
        scale, of_r, of_m = jax.random.split(key, 3)
        shape = (ROWS, TOY_LENGTH, config.dim)
        c = jax.random.uniform(scale, (ROWS, 1, 1), minval=0.5, maxval=2.5)
        return c * jax.random.normal(of_r, shape), jax.random.normal(of_m, shape)

    def error(params, rwkv, mamba):
        _, sown = apply(config, params, rwkv, mamba)
        weight = jnp.mean(sown["activations"]["gate"][0], axis=(1, 2))  # [B]
        of_r, of_m = (jnp.var(x, axis=(1, 2)) for x in (rwkv, mamba))
        return jnp.mean(jnp.square(weight - of_m / (of_r + of_m)))

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(error)(params, *draw(key))
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    @lab.jit(quick)
    def losses(key):
        params = initial(config, key)
        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    found = np.stack([np.asarray(losses(jax.random.key(seed)), float) for seed in seeds])
    return 1 - found[:, -ends:].mean(1) / found[:, :ends].mean(1)


if __name__ == "__main__":
    command.run(main)
