"""Whole runs of `python -m gt_jax.train`, several at a time, a process each."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from gt_jax import checkpoint
from gt_jax.errors import InputError
from gt_jax.training import metrics

CONFIGS = Path(__file__).parents[2] / "configs"


def run_all(tasks: Sequence[tuple], *, jobs: int) -> Iterator[dict]:
    """Yields run(*task) for every task in order, `jobs` of them at a time."""
    # The jobs share a GPU's memory, with each other and with this process.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run, *zip(*tasks))


def run(name: str, changes: Mapping, seed: int, workdir=None) -> dict:
    """One run of the trainer.

    Args:
        name: of a file in configs/.
        changes: config fields -> values that differ from the file's.
        seed: as config.seed.
        workdir: where the run is kept; it is not kept if None.

    Returns:
        A dict of its losses in nats per character, its speed, and what it ran on.

    Raises:
        InputError: the trainer refused to run or broke down; the message is the trainer's.
    """
    fields = {"log.tensorboard": False, "train.sample_tokens": 0} | dict(changes) | {"seed": seed}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(workdir or f"{folder}/run")
        command = [sys.executable, "-m", "gt_jax.train", f"--config={CONFIGS / name}.py"]
        command += [f"--workdir={workdir}", *(f"--config.{f}={v}" for f, v in fields.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["the trainer ended early"]
            raise InputError(f"{name}: {lines[-1].removeprefix('error: ')}")
        rows = metrics.read(workdir)
        # metrics.jsonl rounds to six digits; the checkpoint keeps them all.
        loss = checkpoint.read_about(checkpoint.find(f"{workdir}@last"))["progress"]["last_loss"]
    rates = [r["tokens_per_second"] for r in rows if r.get("tokens_per_second")] or [0]
    curve = [(r["step"], round(r["validation_loss"], 4)) for r in rows if "validation_loss" in r]
    return {
        "seed": seed,
        "loss": loss,
        "train_loss": rows[-1]["loss"],
        "curve": curve,
        "gate": [round(g, 3) for g in rows[-1].get("gate", [])],
        "steps": rows[-1]["step"],
        "tokens_per_second": round(statistics.median(rates)),
        "seconds": round(time.perf_counter() - began),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
