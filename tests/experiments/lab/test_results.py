"""What an experiment writes can be read again, and mistakes take one line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import generation, kernels
from experiments.lab import command, formats, results
from experiments.lab.statistics import estimate
from gt_jax.errors import InputError

DOC = """What happens?

    python -m experiments what
"""


def options_of(*argv):
    parser = command.parser("what", DOC)
    parser.add_argument("--steps", type=int, default=500)
    return command.parse(parser, argv)


def test_a_trial_does_not_take_the_place_of_what_was_measured():
    folder = results.FOLDER
    assert results.path_of(options_of()) == folder / "what.json"
    assert results.path_of(options_of(), "other") == folder / "other.json"
    assert results.path_of(options_of("--quick")) == folder / "quick" / "what.json"
    assert results.path_of(options_of("--quick", "--out=a.json")) == Path("a.json")


@pytest.fixture
def written(tmp_path, capsys):
    options = options_of("--seeds=2", "--steps=7", f"--out={tmp_path / 'deep' / 'what.json'}")
    ys = np.array([[3.0, 2.0], [3.5, 1.5]])
    found = estimate([1.63284, 1.62])
    result = results.write(
        options,
        settings={"steps": options.steps, "rates": (3e-4, 1e-3)},
        measures={"loss": found, "ratio": np.float32(0.5), "nothing": math.nan},
        tables=[results.table("Losses", ["model", "loss", "n"], [["GF", found, 12345]], "A note.")],
        plots=[
            results.plot("Curves", "step", "loss", [results.line("GF", [1, 2], ys)], log="x"),
            results.plot("Ends", "loss", "", [results.dot("GF", found)]),
        ],
        notes=["Mind this."],
    )
    return options.out, result, capsys.readouterr().out


def test_result_says_how_it_came_about(written):
    path, result, _ = written
    assert result == results.read(path)
    assert result["command"] == f"python -m experiments what --seeds=2 --steps=7 --out={path}"
    assert result["about"] == "What happens?" and result["name"] == result["experiment"] == "what"
    assert result["settings"]["seeds"] == [0, 1] and result["settings"]["rates"] == [3e-4, 1e-3]
    assert result["device"] and result["jax"] and result["seconds"] >= 0
    assert result["commit"] is None or len(result["commit"]) == 40
    assert result["measures"]["loss"]["values"] == [1.63284, 1.62]
    assert result["measures"]["ratio"] == 0.5 and result["measures"]["nothing"] is None


def test_line_goes_through_the_means(written):
    (line,) = written[1]["plots"][0]["series"]
    assert line["y"] == [3.25, 1.75] and line["low"][0] < 3 and line["high"][1] > 2


def test_intervals_of_shares_end_where_shares_do():
    line = results.line("GF", [1, 2], [[0.0, 1.0], [0.1, 0.7]], within=results.SHARE)
    assert line["y"] == pytest.approx([0.05, 0.85])
    assert line["low"] == [0, 0] and line["high"][1] == 1 and 0.1 < line["high"][0] < 1
    dot = results.dot("GF", estimate([0.0, 0.1, 0.8]), within=results.SHARE)
    assert dot["mean"] == pytest.approx(0.3) and dot["low"] == 0 and 0.8 < dot["high"] <= 1


def test_tables_are_printed_and_plots_drawn(written):
    path, _, out = written
    assert "Losses" in out and "1.626 ± 0.082" in out and "12,345" in out
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        ("GF", "GF"),
        (True, "yes"),
        (3, "3"),
        (12345, "12,345"),
        (1.63284, "1.6328"),
        (3e-4, "0.0003"),
        (-12.345, "−12.35"),
        (1234.5, "1234"),
        (3e-6, "3e−06"),
        (0.0, "0"),
        ({"mean": 2.0, "low": None, "high": None}, "2.0000"),
        ({"mean": None, "low": None, "high": None}, "–"),
        ({"mean": 98.0, "low": 97.0, "high": 99.0}, "98.0 ± 1.0"),
        ({"mean": -1.63284, "low": -1.63784, "high": -1.62784}, "−1.6328 ± 0.0050"),
        ({"mean": 1.0, "low": 1.0, "high": 1.0}, "1.0000 ± 0.0000"),
        ({"mean": 3.416e-6, "low": 3.396e-6, "high": 3.436e-6}, "3.42e−06 ± 2e−08"),
    ],
)
def test_cells_as_text(cell, text):
    assert formats.show(cell) == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds=0"], "--seeds=0 must be at least 1"),
        (["--seeds=two"], "--seeds: invalid int value: 'two'"),
        (["--seed=2"], "unrecognized arguments: --seed=2"),
        (["--group=-1"], "--group=-1 must be at least 1"),
    ],
)
def test_wrong_flag_is_one_line(argv, message):
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        options_of(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize("out", ["folder", "file/what.json"])
def test_result_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"^--out={tmp_path / out} .*; name another file$"):
        options_of(f"--out={tmp_path / out}")
    options_of(f"--out={tmp_path / 'new/what.json'}")


@pytest.mark.parametrize("benchmark", [generation, kernels])
def test_benchmarks_refuse_a_result_that_cannot_be_written(tmp_path, benchmark):
    """Before they have measured for minutes."""
    with pytest.raises(InputError, match=rf"^--out={tmp_path} .*; name another file$"):
        benchmark.main(["--quick", f"--out={tmp_path}"])
    assert not (tmp_path / "new").exists()


def test_names_of_a_list():
    assert command.one_of({"GF": 1, "HY": 2}, "hy,GF", "--only") == ["HY", "GF"]
    with pytest.raises(InputError, match="--only=xx must be of GF, HY"):
        command.one_of({"GF": 1, "HY": 2}, "gf,xx", "--only")


def test_damaged_results_are_refused(tmp_path, written):
    path = tmp_path / "other.json"
    with pytest.raises(InputError, match=r"other.json cannot be read \(No such file"):
        results.read(path)
    path.write_text(written[0].read_text()[:-40])
    with pytest.raises(InputError, match="is not JSON: it is damaged; run its experiment again"):
        results.read(path)
    for text in ("[]", "{}", json.dumps(written[1] | {"tables": 3})):
        path.write_text(text)
        with pytest.raises(InputError, match="it is no result of a laboratory experiment"):
            results.read(path)
