"""Compiles a training step for 8, 64 and 256 devices; prints what each holds and exchanges.

Run by test_many_devices.py in a process of its own, as devices are counted when JAX starts.
"""

import collections
import functools
import json
import math
import re
import sys

import jax
import numpy as np
from jax.sharding import AxisType

from gt_jax.config import default_config, from_config_dict
from gt_jax.data import make_batches
from gt_jax.models import make_config, make_model
from gt_jax.training import optimizer, parallel
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_train_step

COLLECTIVE = r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
optimizer._LARGE = 1024  # moments of large leaves are cut, and this model has only small ones


def report(sizes):
    """Bytes of parameters and moments on a device, and the collectives of a step, by kind."""
    devices = np.prod(list(sizes.values()))
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:devices],
    )
    rows, length = 256, 16
    config = default_config()
    config.update({"train": {"batch_size": rows, "seq_len": length}})
    config = from_config_dict(config)
    model = make_model(make_config("gf-mh", vocab_size=64, dim=64, layers=2, heads=2))
    schedule = make_schedule(config.optim, 20)
    tx = make_optimizer(config.optim, schedule)
    make_step = functools.partial(make_train_step, model, tx, schedule, config)
    make_state = functools.partial(init_state, model, tx, config)
    state = jax.eval_shape(make_state, jax.random.key(0))
    shardings = parallel.state_sharding(mesh, state)

    def held(tree):  # float32 all
        shapes = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree)]
        return 4 * sum(map(math.prod, shapes))

    step = parallel.compile_train_step(make_step, mesh, "jit", state, activation=2**16)
    text = [np.arange(rows * (length + 2), dtype=np.int32) % 64]
    batch = next(make_batches(text, order="windows", batch_size=rows, seq_len=length))
    state = parallel.shapes_on(shardings, state)
    batch = parallel.shapes_on(parallel.batch_shardings(batch, mesh), batch)
    lowered = step.lower(state, batch)
    compiled = lowered.compile().as_text()
    return {
        "parameters": held(state.params),
        "moments": held(state.opt_state.mu),
        "gathers": lowered.as_text().count("stablehlo.all_gather"),
        "compiled": dict(collections.Counter(re.findall(COLLECTIVE, compiled))),
    }


if __name__ == "__main__":
    print(json.dumps([report(sizes) for sizes in json.loads(sys.argv[1])]))
