import json
import os
import subprocess
import sys

import pytest

import gt_jax
from gt_jax.generation import generate
from gt_jax.training.samples import Samples

# Trains, and prints of each sample which programs it has and what was traced and compiled for it.
LISTENS = """
import json, sys, threading
import jax
import gt_jax.train as program
from gt_jax.training import placement

me, heard, sample = threading.get_ident(), [], program._sample

def listen(event, seconds, **about):
    if threading.get_ident() == me:
        heard.append(event)

def listened(job, params, *rest):
    heard.clear()
    sample(job, params, *rest)
    devices = jax.tree.leaves(placement.on_one_device(params, job.mesh))[0].devices()
    print("SAMPLE", json.dumps([sorted(job.sampling), heard, len(devices)]))

jax.monitoring.register_event_duration_secs_listener(listen)
program._sample = listened
program.main(sys.argv)
"""


@pytest.mark.parametrize(
    ("settings", "programs", "devices"),
    [
        ({}, ["begin", "burst"], 1),
        ({"parallel.sequence": 2}, ["begin", "burst"], 1),
        ({"parallel.fsdp": 4}, [], 4),
        ({"parallel.mode": "pmap"}, [], 1),
    ],
    ids=["jit", "sequence", "fsdp", "pmap"],
)
def test_several_devices_draw_what_one_draws(tmp_path, settings, programs, devices):
    """By programs compiled before, wherever each device holds the whole model."""
    text = tmp_path / "text.txt"
    text.write_text("Now is the winter of our discontent made glorious summer. " * 40)
    small = {"train.steps": 2, "train.sample_every": 1, "train.sample_tokens": 40}
    small |= {"train.batch_size": 4, "train.seq_len": 8, "train.eval_tokens": 64, "model.layers": 1}
    small |= {"data.source": text, "train.sample_prompt": "winter", "log.tensorboard": False}
    flags = [f"--config.{name}={value}" for name, value in (small | settings).items()]
    done = subprocess.run(
        [sys.executable, "-c", LISTENS, "--config=tiny", f"--workdir={tmp_path / 'run'}", *flags],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("SAMPLE ")]
    found = [json.loads(line.removeprefix("SAMPLE ")) for line in lines]
    assert [(names, of) for names, _, of in found] == [(programs, devices)] * 2
    if programs:
        assert [heard for _, heard, _ in found] == [[], []]
    model, params, tokenizer = gt_jax.load(f"{tmp_path / 'run'}@last")
    prompt = tokenizer.encode("winter")
    expected = tokenizer.decode([*prompt, *generate(model, params, prompt, max_tokens=40)])
    written = (tmp_path / "run" / "samples.txt").read_text()
    assert written.endswith(f"--- after 2 steps ---\n{expected}\n\n")


def test_samples_after_the_checkpoint_are_cut(tmp_path):
    samples = Samples(tmp_path, start=0)
    for step in (10, 20, 30):
        samples.write(step, f"text of {step}\nafter 99 steps")
    before = (tmp_path / "samples.txt").read_text()
    again = Samples(tmp_path, start=20)
    assert again.last == 20
    again.write(30, "text of 30\nafter 99 steps")
    assert (tmp_path / "samples.txt").read_text() == before


def test_text_without_bytes_in_utf8_is_escaped(tmp_path):
    Samples(tmp_path, start=0).write(1, "a\ud800b")
    assert "a\\ud800b" in (tmp_path / "samples.txt").read_text("utf-8")
