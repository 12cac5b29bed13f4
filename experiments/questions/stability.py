"""Do gates stay alive at every depth, and do gradients reach far, up to 2048 tokens?

    python -m experiments stability --seeds=3

Hybrids of width 128 and 8 blocks, trained on rows of 2048 characters for 500 steps, then looked at
with rows of 128 to 2048 tokens, beside their initial weights:

    reach    norm of the gradient of the last 16 tokens' loss in the first half of a row's
             embeddings, over that in its second half (the original took the loss of position 0, in
             which no later token can have a gradient)
    gates    RWKV's weight by block and its standard deviation over positions
    growth   variance of the residual stream behind the last block over that behind the first

On one H200 3 seeds took 9 minutes beside two other trainings; most of that compiles.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import branches, command, results
from experiments.lab.programs import side_by_side
from experiments.lab.statistics import estimate
from gt_jax.data.batches import Batch
from gt_jax.models import make_model

DESIGNS = {
    "GF-MH": {},
    "minGRU": {"model.fusion": "mingru"},
    "running mean": {"model.fusion": "linrec"},
    "ParallelScan": {"model.fusion": "pscan"},
    "twin debate": {"model.preset": "twin-debate"},
}
LENGTHS = (128, 512, 2048)
ROWS, LAST, RATE = 4, 16, 3e-3


def main(argv=None):
    parser = command.parser("stability", __doc__)
    parser.set_defaults(seeds=3, source="shakespeare-all")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    options = command.parse(parser, argv)
    names = list(DESIGNS)[: 2 if options.quick else None]
    lengths = (32, 64) if options.quick else LENGTHS
    shared = {"model.preset": "gf-mh", "optim.lr": RATE, "train.batch_size": ROWS}
    shared |= {"train.eval_tokens": ROWS * max(lengths)}
    shared |= command.common(options, evaluations=1) | {"train.seq_len": max(lengths)}
    configs = {name: lab.make_config(shared | DESIGNS[name]) for name in names}
    task = lab.text_task(configs[names[0]])
    arms = {name: lab.Arm(config, task) for name, config in configs.items()}
    trained = lab.train(
        arms,
        seeds=options.seeds,
        group=options.group,
        keep_params=True,
        compile_fast=options.quick,
    )

    start = lambda name: branches.initial_params(arms[name], options.seeds, quick=options.quick)
    initial = dict(zip(names, side_by_side(start, names)))

    def look(job):
        name, length = job
        weights = {"untrained": initial[name], "trained": trained[name].params}
        model_config = trained[name].model_config
        return looked_at(model_config, weights, task, length, quick=options.quick)

    jobs = list(itertools.product(names, lengths))
    seen = dict(zip(jobs, side_by_side(look, jobs)))
    measures, rows, series = {}, [], []
    for name in names:
        measures[f"loss {name}"] = estimate(trained[name].loss()[:, -1])
        for when, length in itertools.product(("untrained", "trained"), lengths):
            found = seen[name, length][when]
            estimates = {key: estimate(x) for key, x in found.items() if x.ndim < 2}
            measures |= {f"{k} {name}, {when}, {length}": v for k, v in estimates.items()}
            rows.append([name, when, length, *estimates.values()])
        gates = seen[name, max(lengths)]["trained"]["gate by block"]
        series.append(results.line(name, range(gates.shape[1]), gates, within=results.SHARE))
    reach = [
        results.line(n, lengths, np.stack([seen[n, T]["trained"]["reach"] for T in lengths], 1))
        for n in names
    ]
    columns = ["design", "weights", "tokens", "reach", "growth", "gate std, least"]
    columns += ["blocks closed", "blocks constant"]
    results.write(
        options,
        settings=lab.settings(configs[names[0]]) | {"lengths": lengths, "rate": RATE},
        measures=measures,
        tables=[results.table("By length of the rows", columns, rows, "Means over seeds.")],
        plots=[
            results.plot(f"Mean gate after training, {max(lengths)} tokens", "block", "", series),
            results.plot("Reach of gradients after training", "tokens", "", reach, log="x"),
        ],
    )


def looked_at(model_config, weights, task, length, *, quick):
    """What some weights do on rows of a length.

    Args:
        weights: name -> parameters, leaves [seeds, ...].

    Returns:
        name -> measure -> [seeds], and "gate by block" [seeds, layers].
    """
    model = make_model(model_config)
    rows = task.held_out[0]
    batch = Batch(rows.inputs[:, :length], rows.targets[:, :length], None, rows.resets)
    targets = np.where(np.arange(length) < length - LAST, -1, batch.targets)

    @lab.jit(quick)
    def of_one(params, batch, targets):
        norms = branches.gradient_by_position(model, params, batch._replace(targets=targets))
        far, near = (jnp.linalg.norm(x) for x in jnp.split(norms, 2, axis=1))
        return branches.look(model, params, batch), far / near

    def of_seeds(params):
        seeds = range(len(jax.tree.leaves(params)[0]))
        one = lambda i: jax.tree.map(lambda x: x[i], params)
        found = [jax.device_get(of_one(one(i), batch, targets)) for i in seeds]
        seen = {name: np.stack([each[name] for each, _ in found]) for name in found[0][0]}
        variance = seen["stream_variance"]
        closed, constant = branches.collapsed(seen["gate"], seen["gate_std"])
        return {
            "reach": np.array([reach for _, reach in found], float),
            "growth": variance[:, -1] / variance[:, 0],
            "gate std, least": seen["gate_std"].min(-1),
            "blocks closed": closed.sum(-1).astype(float),
            "blocks constant": constant.sum(-1).astype(float),
            "gate by block": seen["gate"],
        }

    return {name: of_seeds(params) for name, params in weights.items()}


if __name__ == "__main__":
    command.run(main)
