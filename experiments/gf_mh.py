"""What the main job ends at: GF-MH after 500 steps, as shipped and with some things changed.

    python -m experiments.gf_mh --source=tinyshakespeare.txt --jobs=6
    python -m experiments.gf_mh --source=tinyshakespeare.txt --lr=1e-3,2e-3 --out=results/lr.json

Every run is the trainer's own, on the file named (`shakespeare` is the embedded corpus). With --lr
only the shipped config runs, once per rate and seed. Prints a table of the last validation losses,
mean and sample standard deviation over seeds, and writes it to --out.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# What is compared with the shipped config: name -> what changes.
VARIANTS = {
    "as shipped": {},
    "learning rate 3e-4": {"optim.lr": 3e-4},
    "reference's split and order": {"data.split": "tracks", "data.order": "tracks"},
    "legacy branch": {"model.branch": "legacy", "model.init": "normal"},
    "legacy branch, 3e-4, reference's split": {
        "model.branch": "legacy",
        "model.init": "normal",
        "optim.lr": 3e-4,
        "data.split": "tracks",
        "data.order": "tracks",
    },
    "embedded corpus": {"data.source": "shakespeare"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True, help="text file to train on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", help="comma-separated learning rates to sweep instead")
    parser.add_argument("--only", default="", help="only the variants with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--out", type=Path, default=Path("results/gf_mh.json"))
    options = parser.parse_args()

    variants = {name: changes for name, changes in VARIANTS.items() if options.only in name}
    if options.lr:
        variants = {f"learning rate {lr}": {"optim.lr": float(lr)} for lr in options.lr.split(",")}
    began = time.perf_counter()
    source = {"data.source": options.source}
    changed = [source | changes for changes in variants.values()]
    tasks = list(itertools.product(["gf_mh"], changed, range(options.seeds)))
    runs = list(run_all(tasks, jobs=options.jobs))

    rows = []
    for i, (name, changes) in enumerate(variants.items()):
        mine = runs[i * options.seeds : (i + 1) * options.seeds]
        losses = [run["loss"] for run in mine]
        sd = statistics.stdev(losses) if len(losses) > 1 else None
        rows.append(
            {"name": name, "changes": changes, "mean": statistics.mean(losses), "sd": sd}
            | {"runs": mine}
        )
        spread = "" if sd is None else f" ± {sd:.4f}"
        print(f"{name:40}{rows[-1]['mean']:.4f}{spread}  n={len(losses)}  from {min(losses):.4f}")
    results = {"seconds": round(time.perf_counter() - began), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


def run_all(tasks, *, jobs):
    """Yields run(*task) for every task in order, `jobs` of them at a time, a process each."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # jobs share a GPU's memory
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        yield from pool.map(run, *zip(*tasks))


def run(name, changes, seed, workdir=None):
    """One run of the trainer on configs/<name>.py with some fields changed, kept in workdir if any.

    Returns its losses in nats per character, its speed, and what it ran on.
    """
    import jax

    from gt_jax.config import from_config_dict
    from gt_jax.train import train

    config = importlib.import_module(f"configs.{name}").get_config()
    config.log.tensorboard = False
    config.train.sample_tokens = 0
    config.update_from_flattened_dict(changes | {"seed": seed})
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        workdir = Path(workdir or f"{folder}/run")
        progress = train(from_config_dict(config), workdir)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    curve = [(r["step"], round(r["validation_loss"], 4)) for r in rows if "validation_loss" in r]
    return {
        "seed": seed,
        "loss": progress.last_loss,
        "train_loss": rows[-1]["loss"],
        "curve": curve,
        "gate": [round(g, 3) for g in rows[-1].get("gate", [])],
        "steps": rows[-1]["step"],
        "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in rows)),
        "seconds": round(time.perf_counter() - began),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    main()
