"""What the main job ends at: GF-MH after 500 steps, as shipped and with some things changed.

    python -m experiments.gf_mh --source=tinyshakespeare.txt
    python -m experiments.gf_mh --source=tinyshakespeare.txt --lr=1e-3,2e-3 --seeds=1

Every run is the trainer's own, on the file named (`shakespeare` is the embedded corpus). With --lr
only the shipped config runs, once per rate and seed. Prints a table of the last validation losses,
mean and sample standard deviation over seeds, and writes it to --out.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

from configs import gf_mh
from gt_jax.config import from_config_dict
from gt_jax.train import train

# What is compared with the shipped config: name -> overrides. "SOURCE" is the file of --source.
VARIANTS = {
    "as shipped": {},
    "learning rate 3e-4": {"optim.lr": 3e-4},
    "reference's split and order": {"data.split": "tracks", "data.order": "tracks"},
    "legacy branch": {"model.branch": "legacy"},
    "legacy branch, 3e-4, reference's split": {
        "model.branch": "legacy",
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
    parser.add_argument("--set", action="append", default=[], help="field=value for every run")
    parser.add_argument("--out", type=Path, default=Path("results/gf_mh.json"))
    options = parser.parse_args()

    variants = VARIANTS
    if options.lr:
        variants = {f"learning rate {lr}": {"optim.lr": float(lr)} for lr in options.lr.split(",")}
    common = dict(pair.split("=", 1) for pair in options.set)
    common = {name: _value(text) for name, text in common.items()}
    rows = []
    for name, changes in variants.items():
        changes = {"data.source": options.source} | common | changes
        began = time.perf_counter()
        runs = [_run(changes | {"seed": seed}) for seed in range(options.seeds)]
        losses, curves = zip(*runs)
        rows.append(
            {
                "name": name,
                "changes": {k: v for k, v in changes.items() if k != "data.source"},
                "losses": losses,
                "mean": statistics.mean(losses),
                "sd": statistics.stdev(losses) if len(losses) > 1 else None,
                "seconds_per_run": (time.perf_counter() - began) / options.seeds,
                "curves": curves,
            }
        )
        spread = f" ± {rows[-1]['sd']:.4f}" if rows[-1]["sd"] is not None else ""
        print(
            f"{name:40}{rows[-1]['mean']:.4f}{spread}  n={options.seeds}"
            f"  {rows[-1]['seconds_per_run']:.0f} s a run",
            flush=True,
        )
    device = jax.devices()[0].device_kind
    results = {"device": device, "jax": jax.__version__, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


def _run(changes):
    """(last validation loss, [(step, validation loss)]) of the trainer's run of the config."""
    config = gf_mh.get_config()
    config.log.tensorboard = False
    config.train.sample_tokens = 0
    config.train.eval_every = 50
    config.update_from_flattened_dict(changes)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        progress = train(from_config_dict(config), Path(folder) / "run")
        rows = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        curve = [
            (r["step"], round(r["validation_loss"], 4)) for r in rows if "validation_loss" in r
        ]
    return progress.last_loss, curve


def _value(text):
    """A command-line value as number, bool or string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
