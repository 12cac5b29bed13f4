"""The benchmark of several GPUs runs on simulated devices, and its figures agree."""

import json
import os
import subprocess
import sys

import jax
import pytest

from experiments.benchmarks import parallel
from experiments.lab import command
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
from tests.training import conftest as small

given = load_config("gf_mh_base")
given.model.layers = 1
init = timing.trainer_of(from_config_dict(given), 16384)[-1]
shapes = jax.eval_shape(init, jax.random.key(0))

def held(fsdp):
    mesh = parallel.make_mesh(fsdp, devices=jax.devices()[:fsdp])
    state = parallel.shapes_on(parallel.state_sharding(mesh, shapes), shapes)
    return benchmark.bytes_a_card((state.params, state.opt_state))

whole, cut = held(1), held(2)
small.VOCAB = 97
timing.make_model = lambda config: small.ToyModel()
benchmark.main(sys.argv[1:])
print(json.dumps([whole, cut]))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The result, and bytes of parameters and moments of a model on one card and on each of two."""
    out = tmp_path_factory.mktemp("parallel") / "parallel.json"
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    flags = ["--quick", "--seeds=2", "--timed_steps=2", "--config=gf_mh", "--length=64"]
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
    one, data = rows(result, "Training")
    assert (one["mode"], one["cards"], data["mode"], data["cards"]) == ("one card", 1, "data", 2)
    assert (one["rows x length"], data["rows x length"]) == ("2 x 16", "4 x 16")
    for row, tokens in ((one, 32), (data, 64)):
        for rate, ms in zip(row["tokens/s"]["values"], row["ms a step"]["values"], strict=True):
            assert rate == pytest.approx(1e3 * tokens / ms, rel=1e-4)
    assert one["speedup"] == 1
    expected = data["tokens/s"]["mean"] / one["tokens/s"]["mean"]
    assert data["speedup"] == pytest.approx(expected, rel=1e-4)


def test_losses_and_bits_are_compared(result):
    one, data = rows(result, "Training")
    assert data["loss difference"] < 1e-4 and one["loss difference"] is None
    assert one["same bits"] is data["same bits"] is True
    assert data["state MiB a card"] == one["state MiB a card"] > 0


def test_each_of_two_cards_that_cut_a_model_holds_half_of_it(found):
    _, (whole, cut) = found
    assert 0.5 * whole < cut < 0.55 * whole


def test_recurrences_over_two_devices_are_those_of_one(result):
    found = rows(result, "Recurrences")
    assert [(row["recurrence"], row["cards"]) for row in found] == [
        (op, cards) for op in ("wkv6", "ssd") for cards in (1, 2)
    ]
    for one, two in zip(found[::2], found[1::2]):
        assert two["speedup"] == pytest.approx(one["ms"]["mean"] / two["ms"]["mean"], rel=1e-4)
        assert two["difference"] < 4e-3  # as in the kernels' tests, of bfloat16


def options_of(*flags):
    parser = command.parser("parallel", "")
    values = {"config": "gf_mh_350m", "rows": 16, "length": 131072}
    parser.set_defaults(**values)
    return command.parse(parser, list(flags))


def test_jobs_have_as_many_rows_a_card():
    jobs = parallel.training_jobs(options_of(), ["data", "fsdp", "sequence"], 4)
    assert [(job.mode, job.cards, job.tokens) for job in jobs] == [
        ("one card", 1, 16 * 2048),
        ("data", 4, 64 * 2048),
        ("fsdp", 4, 64 * 2048),
        ("reference", 1, 64 * 2048),
        ("one card, long", 1, 131072),
        ("sequence", 4, 131072),
    ]
    assert [job.changes.get("parallel.fsdp", 1) for job in jobs] == [1, 1, 4, 1, 1, 1]
    assert jobs[3].changes["optim.grad_accumulation"] == 4  # as much at once as one card does


def test_what_fails_is_a_row_with_the_reason():
    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile ...")

    job = parallel.Job("fsdp", "gf_mh", 2, {"train.batch_size": 2, "train.seq_len": 16})
    found = {job.name: parallel.attempt(fail)}
    ((_, row),) = parallel.compare([job], found)
    cells = parallel.cells(job, row)
    assert cells[4] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert len(cells) == len(parallel.TRAINING_COLUMNS)


def test_one_device_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(InputError, match="there is one device"):
        parallel.main([])
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(InputError, match="--length=131072 must be a multiple of the 3 devices"):
        parallel.main([])
