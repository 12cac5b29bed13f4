"""Trains a few steps on one device and on all there are, in every mode; prints what each measured.

    python -m tests.training.spread jit pmap "2 fsdp" "2 fsdp 2 sequence" balance

Run by test_parallel.py in a process of its own, as devices are counted when JAX starts.
"""

import functools
import json
import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from gt_jax.config import default_config, from_config_dict
from gt_jax.data import make_batches
from gt_jax.models import make_config, make_model
from gt_jax.training import debate, optimizer, parallel
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_eval_step, make_train_step

optimizer._LARGE = 1024  # moments of large leaves are cut, and this model has only small ones
ROWS, LENGTH, STEPS = 16, 8, 4
# Groups of heads; and an RWKV branch that says something, as the balance of a row compares them.
SIZES = {"dim": 32, "layers": 1, "heads": 2, "state_size": 8, "mamba_head_dim": 16}
MODEL = make_model(
    make_config("gf-mh", vocab_size=20, **SIZES, mamba_groups=2, branch_start="neither")
)
# Documents, some of which start where a device's tokens do.
TEXT = [np.random.default_rng(0).integers(0, 20, n, dtype=np.int32) for n in (500, 300, 44, 156)]
# All that is summed over a batch; and an optimizer that looks at whole matrices.
SETTINGS = {
    "": {
        "optim.grad_accumulation": 2,
        "train.carry_state": True,
        "data.order": "tracks",
        "train.rwkv_dropout_start": 0.3,
        **{f"debate.{name}_weight": 0.1 for name in debate.NAMES},
    },
    "muon": {"optim.name": "muon", "optim.ema": 0.5},
}


class Trained:
    """What a step under some settings needs, and the state it begins with."""

    def __init__(self, settings):
        config = default_config()
        config.update_from_flattened_dict(
            {"train.batch_size": ROWS, "train.seq_len": LENGTH} | SETTINGS[settings]
        )
        config = from_config_dict(config)
        schedule = make_schedule(config.optim, 20)
        tx = make_optimizer(config.optim, schedule)
        self.make_step = functools.partial(make_train_step, MODEL, tx, schedule, config)
        init = functools.partial(init_state, MODEL, tx, config, jax.random.key(config.seed))
        self.first = jax.device_get(jax.jit(init)())

    def alone(self):
        return self.rows(jax.jit(self.make_step(None)), self.first)[0]

    def spread(self, mode):
        """In a mode: jit, pmap, or how many devices share what ("2 fsdp 2 sequence")."""
        sizes = dict(zip(mode.split()[1::2], map(int, mode.split()[::2])))
        mesh = parallel.make_mesh(**sizes)
        assert mesh.size == len(jax.devices())
        shapes = jax.eval_shape(lambda: self.first)
        state = jax.device_put(self.first, parallel.state_sharding(mesh, shapes))
        mapped = "pmap" if mode == "pmap" else "jit"
        step = parallel.compile_train_step(self.make_step, mesh, mapped, shapes, activation=2**16)
        put = (lambda batch: batch) if mode == "pmap" else functools.partial(_put, mesh)
        rows, state, held_out = self.rows(step, state, put)
        cut = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)]
        assert any(cut) == ("fsdp" in mode)
        for leaf in jax.tree.leaves(state.carry):
            each = ROWS * sizes.get("sequence", 1) // mesh.size
            assert all(shard.data.shape[0] == each for shard in leaf.addressable_shards)
        evaluate = parallel.compile_eval_step(make_eval_step(MODEL), mesh)
        sums, _ = evaluate(state.evaluated, held_out, None)
        return rows, {"loss": float(sums.loss), "tokens": int(sums.tokens)}

    def rows(self, step, state, put=lambda batch: batch):
        """(metrics of each step, the last state, the batch after it)."""
        batches, rows = make_batches(TEXT, order="tracks", batch_size=ROWS, seq_len=LENGTH), []
        for _ in range(STEPS):
            state, numbers = step(state, put(next(batches)))
            rows.append({name: np.asarray(value).tolist() for name, value in numbers.items()})
        return rows, state, next(batches)


def _put(mesh, batch):
    return parallel.put_batch(batch, mesh)


def balance():
    """The balance of rows whose halves differ, and its gradient: devices that share them; one."""

    def of_rows(w, r, m):
        branches = debate._Branches(None, None, r, m, None, None, w)
        counted = w > 0.1
        return jax.numpy.sum(debate._balance([branches], counted), where=counted)

    mesh, rows = parallel.make_mesh(1, 2), P("batch", "sequence")
    on_devices = functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, check_vma=False)
    gradient = on_devices(jax.value_and_grad(of_rows), out_specs=(P(), rows))
    total = on_devices(lambda *x: jax.lax.psum(of_rows(*x), mesh.axis_names), out_specs=P())
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(size=shape).astype("f") for shape in ((4, 8), (4, 8, 2), (4, 8, 2))]
    arrays[1][:, :4] *= 9
    found = (total(*arrays), gradient(*arrays)[1]), jax.value_and_grad(of_rows)(*arrays)
    return [[float(value), np.asarray(slope).tolist()] for value, slope in found]


def main(modes):
    trained, result = {}, {}
    for mode in modes:
        if mode == "balance":
            result[mode] = balance()
            continue
        settings = "muon" if mode.startswith("muon ") else ""
        if settings not in trained:
            trained[settings] = Trained(settings)
            result[settings] = trained[settings].alone()
        result[mode] = trained[settings].spread(mode.removeprefix("muon "))
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
