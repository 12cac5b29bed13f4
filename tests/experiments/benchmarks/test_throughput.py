"""Speeds are counted as tokens over seconds, and compared stretch by stretch."""

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import jax
import pytest

from experiments.benchmarks import throughput
from experiments.lab import claims, families, results
from gt_jax.errors import InputError


class Clock:
    """A program whose runs take the next of some seconds."""

    def __init__(self, *seconds):
        self.seconds = iter(seconds)

    def run(self, steps):
        return next(self.seconds)


class FullGpu:
    """A program that fits in the memory but finds no room in it."""

    def run(self, steps):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_median_and_range_are_those_of_the_stretches():
    rate = throughput.spread([30.0, 10.0, 25.0])
    assert (rate["mean"], rate["low"], rate["high"], rate["n"]) == (25.0, 10.0, 30.0, 3)
    one = throughput.spread([25.0])
    assert (one["mean"], one["low"], one["high"]) == (25.0, None, None)


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(throughput.programs, "program_bytes", lambda compiled: 2**21)
    monkeypatch.setattr(throughput.programs, "bytes_free", lambda: 2**20)
    monkeypatch.setattr(throughput, "flops_per_token", lambda config, length: 10)
    monkeypatch.setattr(throughput, "described", lambda family, model: [family])
    made = Clock()  # has no seconds: it cannot run
    made.compiled, made.model = None, throughput
    monkeypatch.setattr(throughput, "config", None, raising=False)
    found = throughput.time_training(made, ("GPT-2", None, 4, 16), 3, 1.0)
    assert found["rate"] is None and found["MiB"] == 2
    monkeypatch.setattr(throughput.programs, "bytes_free", lambda: 2**22)
    made = Clock(9, 0.5, 1, 2, 4)  # two steps, one step of half a second, then stretches of two
    made.compiled, made.model = None, throughput
    found = throughput.time_training(made, ("GPT-2", None, 4, 16), 3, 1.0)
    full = FullGpu()
    full.compiled, full.model = None, throughput
    assert throughput.time_training(full, ("GPT-2", None, 4, 16), 3, 1.0)["rate"] is None
    assert found["rate"]["values"] == [128, 64, 32] and found["cells"][-2] == 10 * 64 / 1e12


def first_here():
    """ProcessPoolExecutor, the first of which is of this process: one Python less starts."""
    pools = iter([ThreadPoolExecutor(1)])
    return lambda *args: next(pools, None) or ProcessPoolExecutor(*args)


def test_experiment_runs_and_answers_the_claim(tmp_path, monkeypatch, plain_hybrid):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # a process for each family
    monkeypatch.setattr(throughput, "ProcessPoolExecutor", first_here())
    two = {family: families.FAMILIES[family] for family in ("GF-MH", "GPT-2")}  # to be quick
    monkeypatch.setattr(throughput, "FAMILIES", two)
    out = tmp_path / "throughput.json"
    throughput.main(["--quick", "--seeds=2", f"--out={out}"])
    result = results.read(out)
    measures = result["measures"]
    mine, gpt = (measures[f"training tokens/s {f}, 32 wide, 4 x 16"]["values"] for f in two)
    ratio = measures["training speed GPT-2 / GF-MH"]
    assert ratio["values"] == pytest.approx([g / m for g, m in zip(gpt, mine)], rel=1e-4)
    assert measures["decoding tokens/s GF-MH, 32 wide, 2 rows"]["mean"] > 0
    assert [len(table["rows"]) for table in result["tables"]] == [2, 2]
    judged = {
        claim.id: v for claim, v in claims.judge_all({"throughput": result | {"quick": False}})
    }
    assert "not measured" not in judged["gpt2-speed"].because


def test_wrong_flags_are_one_line():
    with pytest.raises(InputError, match="--seeds=9 must be at most 7"):
        throughput.main(["--seeds=9"])
    with pytest.raises(InputError, match="--only=LSTM must be of GF-MH"):
        throughput.main(["--only=LSTM"])


def test_processes_share_out_every_program(monkeypatch):
    training, decoding = throughput.TRAINING, throughput.DECODING
    jobs = {("train", *p) for p in training} | {("decode", *p) for p in decoding}
    for cores, processes in ((2, 2), (16, 6), (128, 6)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        shares = throughput.shares(["RWKV-6", "GPT-2"], training, decoding)
        assert len(shares) == processes
        for family in ("RWKV-6", "GPT-2"):
            mine = [job for f, part in shares if f == family for job in part]
            assert len(mine) == len(jobs) and set(mine) == jobs
