"""What every config in configs/ ends at, as shipped.

    python -m experiments presets --jobs=12
    python -m experiments presets tiny gpt2 --steps=20
    python -m experiments presets --seeds=3 --out=now.json --against=then.json

Every run is the trainer's own. The large ones, gf_mh_8m and gf_mh_base to gf_mh_1b, take half an
hour to two days of an H200 and have to be asked for.
Prints, and writes to --out, each run's last validation loss in nats per character, its speed while
the other jobs ran beside it (evaluation and compilation left out), and its seconds in all.

--against compares the losses with those of another such file, config by config where both trained
equally long: the difference of the means over seeds, and how much of it chance explains. Seeds are
taken to scatter alike in all configs, so their standard deviation s is that of all together. Means
over m and n seeds then differ by less than t s sqrt(1/m + 1/n) in 95 of 100 cases where nothing
differs but the seeds; with as many configs as there are, Bonferroni's share of the 5 % each.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

from experiments.lab import command, formats, results
from experiments.lab.jobs import run_all
from experiments.lab.statistics import CONFIDENCE
from gt_jax.errors import InputError

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
    parser.add_argument("--against", type=Path, help="an older result to compare with")
    options = parser.parse_args(argv)
    before = read_rows(options.against) if options.against else []

    changes = {"train.steps": options.steps} if options.steps else {}
    # Seed by seed: the programs of the first are on disk for the others.
    tasks = [(name, changes, seed) for seed in range(options.seeds) for name in options.configs]
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
    if before:
        print("\n" + formats.as_text(comparison(rows, before)))


def read_rows(path):
    """Rows of a file that --out wrote.

    Raises:
        InputError: there is none, or it is something else.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
        return [{name: row[name] for name in ("config", "seed", "steps", "loss")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--against={path} is no result of presets ({error})") from None


def comparison(rows, before):
    """The table that the module's docstring describes.

    Raises:
        InputError: no config was trained equally long in both, or none with several seeds.
    """
    now, old = by_config(rows), by_config(before)
    both = [key for key in now if key in old]
    if not both:
        raise InputError("--against has no run of these configs with as many steps")
    groups = [[*side[key].values()] for side in (now, old) for key in both]
    freedom = sum(len(losses) - 1 for losses in groups)
    if not freedom:
        raise InputError("--against needs --seeds=2 or more: chance is measured by seeds")
    deviation = math.sqrt(sum(np.var(g) * len(g) for g in groups) / freedom)
    t = stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / len(both), freedom)
    found = []
    for key in both:
        a, b = now[key], old[key]
        difference = np.mean([*a.values()]) - np.mean([*b.values()])
        chance = t * deviation * math.sqrt(1 / len(a) + 1 / len(b))
        same = [a[seed] - b[seed] for seed in a if seed in b]
        cells = [np.mean([*a.values()]), np.mean([*b.values()]), difference, chance]
        cells += [abs(difference) <= chance, np.mean(same) if same else None]
        found.append([*key, f"{len(a)}, {len(b)}", *(formats.plain(cell) for cell in cells)])
    title = f"Validation loss, now and before; seeds scatter by {deviation:.4f}"
    columns = ["config", "steps", "seeds", "now", "before", "difference", "by chance up to"]
    return results.table(title, [*columns, "within", "same seed"], found)


def by_config(rows):
    """{(config, steps): {seed: loss}}."""
    found = {}
    for row in rows:
        found.setdefault((row["config"], row["steps"]), {})[row["seed"]] = row["loss"]
    return found


if __name__ == "__main__":
    command.run(main)
