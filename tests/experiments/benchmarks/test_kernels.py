"""The benchmark of the kernels runs anywhere, gives numbers, and says why where it has none."""

import json
import re

import jax
import pytest

from experiments.benchmarks import kernel_tables, kernels
from gt_jax.errors import InputError
from gt_jax.kernels import choose_impl


@pytest.mark.parametrize("dtype", kernels.TOLERANCE)
def test_quick_benchmark_gives_numbers_or_the_reason(tmp_path, capsys, monkeypatch, dtype):
    if long := dtype == "float32":  # too long for a reference, and so compared with two halves
        monkeypatch.setattr(kernels, "LONGEST_CHECKED", 32)
    out = tmp_path / "kernels.json"
    shapes = ["--shapes", "wkv6:1,64,1", "ssd:1,64,1"]
    kernels.main([*shapes, "--quick", f"--dtype={dtype}", f"--out={out}"])
    assert "over floor" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["op"], row["who"]) for row in rows] == [
        (op, who) for op in ("wkv6", "ssd") for who in ("floor", "chunked", "mosaic")
    ]
    for row in rows:
        if row["who"] == "mosaic" and choose_impl(row["op"])[0] != "mosaic":
            reason = "impl='mosaic' cannot run here: the (Pallas|Hopper) kernels need"
            assert re.search(reason, row["reason"])
            continue
        assert all(row[part]["ms"] > 0 for part in kernels.PASSES)
        if row["who"] != "floor":
            found = row["halves" if long else "errors"]
            assert 0 < max(found.values()) < kernels.TOLERANCE[dtype]
            assert not long or found.keys() > {"o", "state"}
            assert row["extra_bytes"] > 0 and row["compile_seconds"] > 0
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_rows_of_other_shapes_stay_and_say_what_else_they_are_of(tmp_path):
    out = tmp_path / "kernels.json"
    found = {"device": "GPU", "jax": "1", "dtype": "bfloat16"}
    rows = [{"op": op, "shape": [1, 64, 1, 64], "who": "floor"} for op in ("wkv6", "ssd")]
    out.write_text(json.dumps(found | {"rows": rows}))
    now = found | {"jax": "2"}
    kept = kernels.rows_of_others(out, [("ssd", (1, 64, 1, 64))], now)
    assert kept == [rows[0] | {"jax": "1"}]
    out.write_text(json.dumps(now | {"rows": kept}))
    assert kernels.rows_of_others(out, [], found) == rows[:1]
    kept = kernels.rows_of_others(out, [("wkv6", (1, 64, 1, 64))], found | {"dtype": "float32"})
    assert kept == [rows[0] | {"dtype": "bfloat16"}]


@pytest.mark.parametrize("shape", ("wkv7:1,64,1", "1,64", "1,0,1", "ssd:1,64,1,2,3", "x"))
def test_wrong_shape_is_one_line(shape):
    message = refused("--shapes", shape)
    assert f"'{shape}' is no shape; write 8,4096,32" in message and "\n" not in message


def refused(*argv):
    """The message of a command line that is wrong, which command.run prints as one line."""
    with pytest.raises(InputError) as error:
        kernels.main([*argv])
    return str(error.value)


def test_shapes_of_another_operation_are_one_line():
    assert refused("--ops", "ssd", "--shapes", "wkv6:1,64,1") == "--shapes has none of --ops ssd"


def test_other_libraries_in_float32_are_refused_in_one_line():
    message = refused("--peers", "--dtype=float32")
    assert message.startswith("--dtype=float32: the libraries") and "\n" not in message


def test_floor_counts_every_input_and_output_once():
    (floor,) = kernels.benchmark("wkv6", (2, 64, 3, 64), {}, 1.0, {})
    one = 2 * 64 * 3 * 64  # elements of r, k, v (2 bytes), w (4), o (2); u is [3, 64] of 4
    forward, backward = (10 + 2) * one + 4 * 3 * 64, (20 + 2) * one + 8 * 3 * 64
    assert floor["forward"]["ms"] == pytest.approx(1e3 * forward)
    assert floor["backward"]["ms"] == pytest.approx(1e3 * backward)
    assert floor["both"]["ms"] == pytest.approx(1e3 * (forward + backward))


def test_an_error_in_the_gradient_is_seen():
    shape = (2, 64, 3, 64)
    inputs, do = kernels.make_inputs("ssd", shape, jax.random.key(0))
    known = kernels.exact("ssd", kernels.one_head(inputs, do, shape))
    found = known | {"dt": 1.01 * known["dt"]}
    errors = kernels.errors(found, known)
    assert errors == {"o": 0, "x": 0, "dt": pytest.approx(0.01)}


def test_times_on_a_line_are_a_fixed_cost_and_one_per_token(capsys):
    def row(length, times):
        passes = {part: {"ms": times(length)} for part in kernels.PASSES}
        return {"op": "ssd", "who": "mosaic", "shape": (8, length, 64, 128)} | passes

    lengths = (4096, 16384, 65536)
    kernel_tables.print_linearity([row(n, lambda n: 0.02 + 1e-4 * n) for n in lengths])
    assert "20 us + 100.0 ns a token, to 0.0 %" in capsys.readouterr().out
    kernel_tables.print_linearity([row(n, lambda n: 1e-8 * n * n) for n in lengths])
    assert "to 0.0 %" not in capsys.readouterr().out
