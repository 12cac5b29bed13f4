"""What every config in configs/ ends at, as shipped.

    python -m experiments presets --jobs=12
    python -m experiments presets tiny gpt2 --steps=20

Every run is the trainer's own. The large ones, gf_mh_8m and gf_mh_base to gf_mh_1b, take hours or
days and have to be asked for.
Prints, and writes to --out, each run's last validation loss in nats per character, its speed while
the other jobs ran beside it (evaluation and compilation left out), and its seconds in all.
"""

import itertools
import json
from pathlib import Path

from experiments.lab import command, results
from experiments.lab.jobs import run_all

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py"))
CONFIGS.remove("base")
LONG = ("gf_mh_8m", "gf_mh_base", "gf_mh_350m", "gf_mh_1b")


def main(argv=None):
    parser = command.plain_parser("presets", __doc__)
    usual = [name for name in CONFIGS if name not in LONG]
    parser.add_argument("configs", nargs="*", default=usual, help="default: all short ones")
    parser.add_argument("--steps", type=int, help="train this long instead, to try it out")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER / "presets.json", help="result to write"
    )
    options = parser.parse_args(argv)

    changes = {"train.steps": options.steps} if options.steps else {}
    tasks = list(itertools.product(options.configs, [changes], range(options.seeds)))
    rows = []
    for (name, _, _), run in zip(tasks, run_all(tasks, jobs=options.jobs)):
        rows.append(row := {"config": name} | run)
        print(
            f"{row['config']:10} seed {row['seed']}  loss {row['loss']:.4f} at step {row['steps']}"
            f"  {row['tokens_per_second']:9,} tokens/s  {row['seconds']:5} s  {row['device']}",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"jobs": options.jobs, "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
