import os
import subprocess
import sys

import pytest

from gt_jax import terminal

PATH = "/a/path/that-is-longer-than/the-terminal/and-must-stay/as-it-is/to-be-copied.txt"


def test_a_paragraph_stands_beside_its_label_and_paths_stay_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = terminal.fill("one two three four five six seven eight nine", "model:  ").split("\n")
    assert lines == ["model:  one two three four five six", "        seven eight nine"]
    assert PATH in terminal.fill(f"from {PATH}, and more", "model:  ")


def test_a_wide_table_becomes_several_with_the_first_column_each(monkeypatch):
    cells = [
        ("name", "size", "long", "about"),
        ("a", "1", "12345678", "some words more"),
        ("b", "22", "3", ""),
    ]
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal.table(cells, texts=(0, 3)) == [
        "name  size      long  about",
        "a        1  12345678  some words more",
        "b       22         3",
    ]
    monkeypatch.setenv("COLUMNS", "21")
    assert terminal.table(cells, texts=(0, 3)) == [
        *("name  size      long", "a        1  12345678", "b       22         3", ""),
        *("name  about", "a     some words more", "b"),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
@pytest.mark.parametrize("columns", [57, 143])
def test_the_width_is_that_of_the_terminal_and_lines_are_whole_without_one(columns):
    import pty
    import termios

    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", "from gt_jax import terminal; print(terminal.width())"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    subprocess.run(command, stdout=theirs, env=env, check=True)
    assert int(os.read(ours, 100)) == columns
    os.close(ours)
    os.close(theirs)
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert int(done.stdout) >= 100_000
