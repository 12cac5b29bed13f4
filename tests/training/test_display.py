import time

from gt_jax.training.display import Display, Speed


def test_speed_counts_neither_the_first_step_nor_pauses(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    speed = Speed(10, start=5)
    speed.begin(())  # Step 6, which compiles, has ended.
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
    assert capsys.readouterr().out == "step 3/9  loss 1.0\n[a] note\n"
