"""The benchmark of memory and time: a row for every program, whatever becomes of it."""

import json
import types

import jax
import pytest

from experiments.benchmarks import train_memory
from experiments.lab import programs, timing
from gt_jax.errors import InputError
from tests.training.conftest import ToyModel


def options_of(**changes):
    values = {"config": "gf_mh_base", "remat": "full,dots,none", "tokens": 32768}
    values |= {"quick": False, "impl": "auto", "timed_steps": 1, "seeds": range(2)}
    return types.SimpleNamespace(**values | changes)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(timing, "make_model", lambda config: ToyModel(config=config))


def rows(path):
    table = json.loads(path.read_text())["tables"][0]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_rows_are_written_as_they_come_and_kept_by_add(toys, tmp_path, capsys, monkeypatch):
    cached = jax.config.jax_enable_compilation_cache
    seen, write = [], train_memory.write_result
    spy = lambda options, rows, shown: (
        seen.append((len(rows), shown)) or write(options, rows, shown)
    )
    monkeypatch.setattr(train_memory, "write_result", spy)
    out = tmp_path / "memory.json"
    flags = ["--quick", "--seeds=2", "--timed_steps=2", f"--out={out}", "--at_once=1"]
    try:
        train_memory.main(["--config=gf_mh,gf_mh_base:model.layers=2", "--remat=none", *flags])
        assert seen == [(1, False), (2, False), (2, True)]
        first = rows(out)
        train_memory.main(["--config=gf_mh", "--remat=full,none", "--add", *flags])
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    found = rows(out)
    assert found[0] == first[1]
    assert [(row["config"], row["remat"]) for row in found] == [
        ("gf_mh_base:model.layers=2", "none"),
        ("gf_mh", "full"),
        ("gf_mh", "none"),
    ]
    for row in found:
        assert row["rows x length"] == "2 x 16" and row["program MiB"] > 0
        for rate, ms in zip(row["tokens/s"]["values"], row["ms a step"]["values"], strict=True):
            assert rate == pytest.approx(1e3 * 32 / ms, rel=1e-4)
    assert "tokens/s" in capsys.readouterr().out


def test_jobs_have_the_tokens_and_what_stores_least_comes_first():
    given = "gf_mh_350m:model.layers=24:optim.lr=1e-4,gf_mh_1b:train.seq_len=8192"
    given += ",gf_mh:train.batch_size=3:model.impl=chunked:log.tensorboard=False"
    jobs = train_memory.jobs_of(options_of(config=given, remat="none,full"))
    shapes = [(job.rows, job.length, job.remat) for job in jobs]
    assert shapes == [
        (16, 2048, "full"),
        (4, 8192, "full"),
        (3, 64, "full"),
        (16, 2048, "none"),
        (4, 8192, "none"),
        (3, 64, "none"),
    ]
    deep, long, short = (job.config for job in jobs[:3])
    assert (deep.model.impl, short.model.impl) == ("auto", "chunked")
    assert (deep.model.layers, deep.model.remat, deep.optim.lr) == (24, "full", 1e-4)
    assert (long.train.batch_size, long.train.seq_len) == (4, 8192)
    assert short.log.tensorboard is False and long.log.tensorboard is True
    assert {job.config.optim.grad_accumulation for job in jobs} == {1}


class OnDevice:
    """A device of 1 MiB, and a program on it."""

    device_kind = "NVIDIA H200"
    compile_seconds, compiled = 3.0, None

    def __init__(self, size, error=None):
        self.size, self.error = size, error
        self.model = types.SimpleNamespace(config=ToyModel().config)

    def memory_stats(self):
        return {"bytes_limit": 2**20, "peak_bytes_in_use": 2**19}

    def restart(self):
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)

    def run(self, steps):
        return 0.5 * steps


@pytest.mark.parametrize("fits", ["program", "memory", "yes", "broken"])
def test_what_does_not_fit_is_a_row_with_the_bytes_that_the_compiler_counts(monkeypatch, fits):
    size = 2**21 if fits == "program" else 2**18
    error = {"memory": "RESOURCE_EXHAUSTED: Out of memory", "broken": "INTERNAL: no"}.get(fits)
    made = OnDevice(size, error)
    monkeypatch.setattr(jax, "local_devices", lambda: [made])
    monkeypatch.setattr(programs, "program_bytes", lambda compiled: size)
    (job,) = train_memory.jobs_of(options_of(remat="dots"))
    monkeypatch.setitem(train_memory._ready, job.name, made)
    if fits == "broken":
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            train_memory.time_steps(options_of(), job)
        return
    row = train_memory.cells(job, train_memory.time_steps(options_of(), job))
    row = dict(zip(train_memory.COLUMNS, row, strict=True))
    assert row["program MiB"] == size / 2**20
    if fits == "yes":
        assert (row["first step s"], row["peak MiB"]) == (3.5, 0.5)
        assert row["tokens/s"]["mean"] == 32768 / 0.5 and row["share of peak"] > 0
    else:
        assert row["first step s"] == "does not fit" and row["tokens/s"] is None


def test_wrong_flags_are_refused_in_one_line():
    refused = {
        "--config=gf_mh:model.layer=2": "'model.layer' is no field",
        "--config=gf_mh:model.layers=x": "model.layers",
        "--config=gf_mh_base:train.seq_len=3000": "must be a multiple of train.seq_len=3000",
        "--remat=all": "--remat=all must be of full, dots, none",
        "--at_once=0": "--at_once=0 must be at least 1",
    }
    for flag, message in refused.items():
        with pytest.raises(InputError, match=message):
            train_memory.main([flag])
