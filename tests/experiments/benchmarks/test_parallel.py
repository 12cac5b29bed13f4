"""The benchmark of several GPUs runs on simulated devices, and its figures agree."""

import json
import os
import subprocess
import sys

import jax
import pytest

from experiments.benchmarks import parallel, parallel_tables
from experiments.lab import command, workers
from gt_jax.errors import InputError

# Devices are counted when JAX starts, so two simulated ones need a process of their own. What
# trains there is a stand-in for a model that compiles quickly.
SCRIPT = """
import json, sys
import jax
from experiments.lab import timing
from experiments.benchmarks import parallel as benchmark
from gt_jax.config import from_config_dict
from gt_jax.config_files import load_config
from gt_jax.training import parallel
from tests.training.conftest import ToyModel

given = load_config("gf_mh_base")
given.model.layers = 1
init = timing.trainer_of(from_config_dict(given), 16384)[-1]
shapes = jax.eval_shape(init, jax.random.key(0))

def held(fsdp):
    mesh = parallel.make_mesh(fsdp, devices=jax.devices()[:fsdp])
    state = parallel.shapes_on(parallel.state_sharding(mesh, shapes), shapes)
    return benchmark.bytes_a_card((state.params, state.opt_state))

whole, cut = held(1), held(2)
timing.make_model = lambda config: ToyModel(config.layers, config)
benchmark.main(sys.argv[1:])
print(json.dumps([whole, cut]))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The result, and bytes of parameters and moments of a model on one card and on each of two."""
    out = tmp_path_factory.mktemp("parallel") / "parallel.json"
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    flags = ["--quick", "--seeds=2", "--timed_steps=2", "--config=gf_mh"]
    flags += ["--cards=2,4", "--length=64"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--parts=recurrences,data", *flags, f"--out={out}"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "speedup" in done.stdout
    return json.loads(out.read_text()), json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def result(found):
    return found[0]


def rows(result, title):
    table = next(t for t in result["tables"] if t["title"].startswith(title))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_speedup_is_of_tokens_per_second_at_the_same_rows_a_card(result):
    found = rows(result, "Training")
    assert [(row["mode"], row["cards"]) for row in found] == [
        ("one card", 1),
        ("data", 2),
        ("data", 4),
    ]
    one = found[0]["tokens/s"]["mean"]
    for row in found:
        n = row["cards"]
        assert row["rows x length"] == f"{2 * n} x 16"
        for rate, ms in zip(row["tokens/s"]["values"], row["ms a step"]["values"], strict=True):
            assert rate == pytest.approx(1e3 * 32 * n / ms, rel=1e-4)
        assert row["speedup"] == pytest.approx(row["tokens/s"]["mean"] / one, rel=1e-4)


def test_losses_and_bits_are_compared(result):
    one, *several = rows(result, "Training")
    assert one["loss difference"] is None and one["same bits"] is True
    for row in several:
        assert row["loss difference"] < 1e-4 and row["same bits"] is True
        assert row["state MiB a card"] == one["state MiB a card"] > 0


def test_speedups_stand_beside_those_wanted(result):
    speedups = {row["cards"]: row["speedup"] for row in rows(result, "Training")}
    found = rows(result, "Speedups")
    assert [(row["of"], row["mode"], row["cards"], row["wanted"]) for row in found] == [
        ("wkv6", "sequence", 2, 1.7),
        ("wkv6", "sequence", 4, 2.9),
        ("ssd", "sequence", 2, 1.7),
        ("ssd", "sequence", 4, 2.9),
        ("gf_mh", "data", 2, 1.9),
        ("gf_mh", "data", 4, 3.6),
    ]
    for row in found[4:]:
        assert row["speedup"] == speedups[row["cards"]] and row["state, of one card's"] == 1


def test_each_of_two_cards_that_cut_a_model_holds_half_of_it(found):
    _, (whole, cut) = found
    assert 0.5 * whole < cut < 0.55 * whole


def test_recurrences_over_devices_are_those_of_one(result):
    found = rows(result, "Recurrences")
    assert [(row["recurrence"], row["cards"]) for row in found] == [
        (op, cards) for op in ("wkv6", "ssd") for cards in (1, 2, 4)
    ]
    for one, *several in (found[:3], found[3:]):
        for row in several:
            assert row["speedup"] == pytest.approx(one["ms"]["mean"] / row["ms"]["mean"], rel=1e-4)
            assert row["difference"] < 4e-3  # as in the kernels' tests, of bfloat16


def options_of(*flags, cards=(4,)):
    parser = command.parser("parallel", "")
    values = {"config": "gf_mh_350m", "rows": 16, "length": 131072, "timed_steps": 4}
    parser.set_defaults(**values, cards=list(cards))
    return command.parse(parser, list(flags))


def test_jobs_have_as_many_rows_a_card():
    jobs = parallel.training_jobs(options_of(), ["data", "fsdp", "sequence"])
    assert [(job.mode, job.cards, job.tokens) for job in jobs] == [
        ("one card", 1, 16 * 2048),
        ("data", 4, 64 * 2048),
        ("fsdp", 4, 64 * 2048),
        ("one card, long", 1, 131072),
        ("sequence", 4, 131072),
        ("reference", 1, 64 * 2048),
    ]
    assert [job.changes.get("parallel.fsdp", 1) for job in jobs] == [1, 1, 4, 1, 1, 1]
    assert jobs[-1].changes["optim.grad_accumulation"] == 4  # as much at once as one card does


def test_one_reference_serves_every_number_of_cards():
    options = options_of(cards=(2, 3, 4))
    options.config = "gf_mh_base,gf_mh_350m"
    names = lambda: [job.name for job in parallel.training_jobs(options, ["data"])]
    once, options.config = names(), "gf_mh_base,gf_mh_350m,gf_mh_base"
    assert names() == once, "a config that is given twice is trained once"
    options.config = "gf_mh_base,gf_mh_350m"
    jobs = parallel.training_jobs(options, ["data"])
    modes = ["one card", "data", "data", "data"]
    assert [job.mode for job in jobs] == 2 * [*modes, "reference"]
    assert [job.config for job in jobs if job.mode == "reference"] == options.config.split(",")
    assert jobs[-1].compared == {2: 32, 3: 48, 4: 64}
    assert jobs[-1].changes["train.batch_size"] == 12 * 16


def test_first_config_and_long_row_come_first():
    options = options_of()
    options.config = "gf_mh_350m,gf_mh_1b"
    jobs = parallel.training_jobs(options, ["data", "sequence"])
    assert [job.name for job in jobs] == [
        "gf_mh_350m one card",
        "gf_mh_350m data on 4",
        "gf_mh_base one card, long",
        "gf_mh_base sequence on 4",
        "gf_mh_350m reference",
        "gf_mh_1b one card",
        "gf_mh_1b data on 4",
        "gf_mh_1b reference",
    ]


def test_what_is_there_is_a_result_before_all_is_measured(tmp_path):
    options = options_of(f"--out={tmp_path / 'parallel.json'}")
    jobs = parallel.training_jobs(options, ["sequence"])
    later = {name: {"reason": "not measured"} for name in ("recurrences", *(j.name for j in jobs))}
    numbers = {"ms": 2.0, "tokens/s": {"values": [8.0]}, "peak": None, "state bytes": 2**20}
    numbers |= {"same bits": True, "compile s": 1.0, "losses": [2.0]}
    parallel_tables.write(options, jobs, later | {jobs[0].name: numbers}, shown=False)
    one, several = rows(json.loads(options.out.read_text()), "Training")
    assert (one["ms a step"], one["state MiB a card"]) == (2.0, 1.0)
    assert several["ms a step"] == "not measured" and several["speedup"] is None


def test_what_fails_is_a_row_with_the_reason():
    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile ...")

    job = parallel.Job("fsdp", "gf_mh", 2, {"train.batch_size": 2, "train.seq_len": 16})
    found = workers.run_all([workers.Work(job.name, fail, fail, (), 2)], here=True)
    ((_, row),) = parallel_tables.compare([job], found)
    cells = parallel_tables.cells(job, row)
    assert cells[4] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert len(cells) == len(parallel_tables.TRAINING_COLUMNS)
    ((*_, speedup, wanted, _),) = parallel_tables.speedups([], [(job, row)])
    assert (speedup, wanted) == (None, 1.9)


def test_devices_that_are_not_there_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(InputError, match="there is one device"):
        parallel.main([])
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    for cards in ("1", "01", "1,1", "0", "2,0", "4", "two", "2,x", "2,,3", "²"):
        with pytest.raises(InputError, match=f"--cards={cards} must be numbers of the 3 devices"):
            parallel.main([f"--cards={cards}"])
    for parts in ("sequence", "data,recurrences"):
        with pytest.raises(InputError, match="--length=131072 must be a multiple of the 3 devices"):
            parallel.main([f"--parts={parts}"])
    options = options_of()
    options.cards = "3,1,02"  # rows are no part of a length
    assert parallel.numbers_of_cards(options, ["data"]) == [2, 3]


@pytest.mark.parametrize(
    "flag", ["rows=0", "length=0", "length=-2", "timed_steps=0", "seconds=0", "seconds=nan"]
)
def test_sizes_below_one_are_refused(flag):
    with pytest.raises(InputError, match=f"--{flag} must be a"):
        parallel.main([f"--{flag}"])
