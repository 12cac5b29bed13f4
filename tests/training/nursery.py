"""Starts runs quickly for tests that end them badly: imports once, forks a process for each.

A line of standard input is a JSON object. {"argv", "out": a file, and what `_prepare` takes} is
answered with the process id of the child that began; {"pid", "kill_after": seconds or null} with
the child's exit status as `os.waitstatus_to_exitcode` gives it.
"""

import gc
import importlib.util
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib.figure  # noqa: F401  once, not in every child
import numpy as np

import gt_jax.train as program
from gt_jax import cli, compilation
from gt_jax.training import job, plot
from gt_jax.training.writer import Writer

ROOT = Path(__file__).parents[2]

# Where a signal can hit a run -> the module or class, and the function during which it comes.
PHASES = {
    "looking at checkpoints": (program, "newest_of_all"),
    "reading the text": (job, "read_text"),
    "making the state": (program, "first_state"),
    "compiling": (program, "Display"),
    "training": (program, "_look_for_reasons"),
    "evaluating": (program, "evaluate"),
    "saving": (Writer, "save"),
    "sampling": (program, "sample"),
    "finishing": (Writer, "finish"),
    "drawing": (plot, "draw_curve"),
}


class Nursery:
    """Runs in processes of their own."""

    def __init__(self, folder, arguments, **more_environment):
        """arguments: of every run, on a text in the folder."""
        folder.mkdir(exist_ok=True)
        text = np.random.default_rng(0).choice(["to be ", "or not ", "that is\n"], 300)
        (folder / "text.txt").write_text("".join(text))
        self.folder, self._last, self._outs = folder, 0, {}
        self._arguments = [*arguments, f"--config.data.source={folder / 'text.txt'}"]
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | environment | more_environment,
            text=True,
        )

    def start(self, workdir, *more, **settings) -> int:
        """Start a run; the id of its process."""
        argv = [*self._arguments, *more, f"--workdir={workdir}"]
        out = self.folder / f"out{len(self._outs)}"
        self._last = self._ask({"argv": argv, "out": str(out), **settings})
        self._outs[self._last] = out
        return self._last

    def end(self, kill_after: float | None = None, pid: int | None = None) -> tuple[int, str]:
        """The exit status of a process, of the last if not named, and all it printed."""
        pid = pid or self._last
        status = self._ask({"pid": pid, "kill_after": kill_after})
        return status, self._outs[pid].read_text()

    def run(self, workdir, *more, **settings):
        self.start(workdir, *more, **settings)
        return self.end()

    def close(self):
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, order) -> int:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _prepare(phase=None, signals=(), skip=0, limit=None, ascii_only=False, devices=1, gpus=None):
    """Make this process signal itself in a phase, or have no disk space, or few characters.

    And give it simulated devices, or GPUs by their numbers.
    """
    jax.config.update("jax_num_cpu_devices", devices)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    if phase:
        owner, name = PHASES[phase]
        usual, calls = getattr(owner, name), iter(range(1 << 30))

        def interrupted(*args, **kwargs):
            if next(calls) == skip:
                for number in signals:
                    os.kill(os.getpid(), number)
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                time.sleep(0.2)  # as anything that takes a while
            return usual(*args, **kwargs)

        setattr(owner, name, interrupted)
    if ascii_only:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "ascii")


def _run(argv, out, **settings):
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _prepare(**settings)
    sys.argv = ["train", *argv]
    cli.run(program.main, leave_threads=True)


def main():
    for number in (signal.SIGTERM, signal.SIGHUP):  # whatever this process was told to ignore
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Children are the command: with --compile_cache=FOLDER, one takes the programs of another.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(program.__name__)
    compilation._WORTH_KEEPING_SECONDS = 0
    gc.set_threshold(50_000, 20, 50)
    gc.freeze()  # children neither search nor copy what is imported
    for line in sys.stdin:
        order = json.loads(line)
        if "argv" in order:
            pid = os.fork()
            if pid == 0:
                _run(**order)
            print(pid, flush=True)
            continue
        if order["kill_after"] is not None:
            time.sleep(order["kill_after"])
            os.kill(order["pid"], signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(order["pid"], 0)[1]), flush=True)


if __name__ == "__main__":
    main()
