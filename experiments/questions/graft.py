"""Does a hybrid grafted from trained parents beat one trained from scratch?

    python -m experiments graft --source=tinyshakespeare.txt --jobs=12
    python -m experiments graft --source=shakespeare --steps=3 --seeds=1

The parents, an RWKV-6 and a Mamba-2 of GF-MH's width and depth, train for --steps each, as
configs/gf_mh.py says; every graft of them then trains for as many. It is held against GF-MH from
scratch for as many steps, and for three times as many, which is what graft and parents read
together.
Prints the last validation losses, mean and sample standard deviation over seeds, and their
differences from the first of these runs with the same seed; writes them with all curves to --out.
"""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from experiments.lab import command, results
from experiments.lab.jobs import run_all
from gt_jax.convert.graft import graft

SIZE = {"model.dim": 128, "model.layers": 8}
PARENTS = {
    "RWKV-6": {"model.preset": "rwkv6", "model.heads": 4},
    "Mamba-2": {"model.preset": "mamba2", "model.state_size": 64},
}
SCRATCH = "from scratch"
# name -> whose embedding, head and final norm, and what changes in training.
GRAFTS = {
    "graft": ("mamba", {}),
    "graft, ends of RWKV-6": ("rwkv", {}),
    "graft, new ends": ("new", {}),
    "graft, learning rate 1e-3": ("mamba", {"optim.lr": 1e-3}),
}


def main(argv=None):
    parser = command.plain_parser("graft", __doc__)
    parser.add_argument("--source", required=True, help="text file to train on")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--gate", type=float, default=0.3, help="share of RWKV at first")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER / "graft.json", help="result to write"
    )
    options = parser.parse_args(argv)
    began = time.perf_counter()
    text = {"data.source": options.source, "train.steps": options.steps}
    seeds = range(options.seeds)

    with tempfile.TemporaryDirectory() as folder:
        workdir = lambda name, seed: f"{folder}/{name}/{seed}"
        variants = {name: SIZE | changes for name, changes in PARENTS.items()}
        variants[SCRATCH] = SIZE | {"model.gate_init": options.gate}
        variants[f"{SCRATCH}, 3 x steps"] = variants[SCRATCH] | {"train.steps": 3 * options.steps}
        names = list(itertools.product(variants, seeds))
        tasks = [("gf_mh", text | variants[name], i, workdir(name, i)) for name, i in names]
        runs = dict(zip(names, run_all(tasks, jobs=options.jobs)))

        names, tasks = list(itertools.product(GRAFTS, seeds)), []
        for name, seed in names:
            rest, changes = GRAFTS[name]
            stored = workdir("stored", f"{name}/{seed}")
            parents = (workdir(parent, seed) for parent in PARENTS)
            graft(*parents, stored, gate=options.gate, rest=rest, seed=seed)
            changes = text | changes | {"model.init_from": stored}
            tasks.append(("gf_mh", changes, seed, workdir(name, seed)))
        runs |= zip(names, run_all(tasks, jobs=options.jobs))

    rows = []
    for name in [*variants, *GRAFTS]:
        mine = [runs[name, seed] for seed in seeds]
        gains = [run["loss"] - runs[SCRATCH, run["seed"]]["loss"] for run in mine]
        row = {"name": name} | summary([run["loss"] for run in mine])
        rows.append(row | {"against_scratch": summary(gains), "runs": mine})
        print(f"{name:28}{show(row)}   against scratch {show(rows[-1]['against_scratch'], '+')}")
    found = {"seconds": round(time.perf_counter() - began), "steps": options.steps}
    found |= {"gate": options.gate, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def summary(values):
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def show(row, sign=""):
    """Mean and spread, such as "1.5204 ± 0.0030"."""
    spread = "" if row["sd"] is None else f" ± {row['sd']:.4f}"
    return f"{row['mean']:{sign}.4f}{spread}"


if __name__ == "__main__":
    command.run(main)
