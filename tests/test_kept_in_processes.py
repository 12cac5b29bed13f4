"""Programs that one process of the train command kept, taken by two that run at once."""

import subprocess
import sys

import numpy as np

from tests.test_kept_programs import COMMAND, FIELDS, arrays, config_of


def test_two_processes_at_once_take_the_programs_of_one_before(tmp_path):
    config_of(tmp_path)  # writes the text
    fields = {f"--config.{name}={value}" for name, value in FIELDS.items()}
    cache = tmp_path / "xla"
    outside = [f"--compile_cache={cache}", f"--config.data.source={tmp_path / 'text.txt'}"]
    command = [sys.executable, "-m", COMMAND, "--config=tiny", *sorted(fields), *outside]

    def start(name):
        return subprocess.Popen(
            [*command, f"--workdir={tmp_path / name}"], stderr=subprocess.PIPE, text=True
        )

    assert start("first").wait() == 0
    for file in cache.glob("*-cache"):  # JAX's own, of small programs too
        file.unlink()
    both = [start("second"), start("third")]
    for process in both:
        assert f"compiled programs come from {cache}" in process.communicate()[1]
        assert process.returncode == 0
    expected = arrays(tmp_path / "first")
    for name in ("second", "third"):
        for x, y in zip(expected, arrays(tmp_path / name), strict=True):
            np.testing.assert_array_equal(x, y)
