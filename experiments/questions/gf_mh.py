"""What the main job ends at: GF-MH after 500 steps, as shipped and with some things changed.

    python -m experiments gf_mh --source=tinyshakespeare.txt --jobs=6
    python -m experiments gf_mh --source=tinyshakespeare.txt --lr=1e-3,2e-3 --out=lr.json

Every run is the trainer's own, on the file named (`shakespeare` is the embedded corpus). With --lr
only the shipped config runs, once per rate and seed. Prints a table of the last validation losses,
mean and sample standard deviation over seeds, and writes it to --out.
"""

import itertools
import json
import statistics
import time
from pathlib import Path

from experiments.lab import command, results
from experiments.lab.jobs import run_all

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


def main(argv=None):
    parser = command.plain_parser("gf_mh", __doc__)
    parser.add_argument("--source", required=True, help="text file to train on")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--lr", help="comma-separated learning rates to sweep instead")
    parser.add_argument("--only", default="", help="only the variants with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER / "gf_mh.json", help="result to write"
    )
    options = parser.parse_args(argv)

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
    found = {"seconds": round(time.perf_counter() - began), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
