import io
import re
import sys
import threading
import time
from concurrent.futures import Future

import pytest

from gt_jax.training.display import Display, Speed


def test_speed_counts_neither_the_first_step_nor_pauses(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    speed = Speed(10, start=5)
    speed.begin(())  # Step 6, which compiles, has ended.
    assert speed.latest(6) is None and speed.overall(6) is None
    now += 4
    speed.begin(())
    assert speed.latest(7) == 10 / 4
    now += 2
    with speed.paused(()):
        assert speed.latest(8) == 10 / 2
        now += 1000
    now += 4
    with speed.paused(()):
        assert speed.latest(10) == 20 / 4
    assert speed.overall(10) == 40 / 10  # Steps 7 to 10.


def test_lines_and_numbers_are_plain_text_off_a_terminal(capsys):
    with Display(start=0, steps=9) as display:
        display.numbers(3, "loss 1.0")
        display.line("[a] note")
    assert capsys.readouterr().out == "compiling\nstep 3/9  loss 1.0\n[a] note\n"


def clean(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


class Terminal(io.StringIO):
    """A terminal; once it shows a second of compiling, the program is ready."""

    def __init__(self, program):
        super().__init__()
        self._program = program

    def isatty(self):
        return True

    def write(self, text):
        if re.search(r"0:00:0[1-9]", text) and not self._program.done():
            self._program.set_result(print)
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
def test_display_says_compiling_and_for_how_long_until_the_program_is_there(
    terminal, monkeypatch, capsys
):
    program = Future()
    if terminal:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "stdout", Terminal(program))
    else:
        threading.Timer(0.6, program.set_result, [print]).start()
    with Display(start=0, steps=9) as display:
        display.wait_for(program, time.perf_counter() - 40)
    said = sys.stdout.getvalue() if terminal else capsys.readouterr().out
    ready = r"compiled (\d+) s after the start"
    if terminal:
        found = re.search(rf"compiling\S* 0:00:0[1-9].*{ready}", clean(said), re.S)
    else:
        found = re.fullmatch(rf"compiling\n{ready}\n", said)
    assert found and int(found[1]) >= 41


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_shows_all_numbers_and_times_however_narrow_it_is(columns, monkeypatch):
    numbers = "loss 2.5153  grad 10.318  lr 4.00e-03  1,477,312 tokens/s  memory 41.2 GiB"
    program = Future()
    program.set_result(print)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal(program))
    with Display(start=0, steps=500) as display:
        display.numbers(500, numbers)
    *_, last = clean(sys.stdout.getvalue()).split("step 500/500")
    assert "…" not in last and last.count("0:00:00") == 2  # elapsed, and remaining
    assert set(numbers.split()) <= set(last.split())


def test_display_raises_what_compiling_raised():
    program = Future()
    program.set_exception(ValueError("no such program"))
    with Display(start=0, steps=9) as display, pytest.raises(ValueError, match="no such program"):
        display.wait_for(program, time.perf_counter())
