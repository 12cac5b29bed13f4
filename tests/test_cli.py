"""The programs as a user meets them: train, resume, evaluate, generate, and mistakes."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gt_jax
from gt_jax import checkpoint, cli, evaluate, generate, train
from gt_jax.training import metrics

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--config=configs/tiny.py", "--config.model.dim=32", "--config.model.layers=1"),
    *("--config.model.state_size=8", "--config.train.steps=20", "--config.train.batch_size=4"),
    *("--config.train.seq_len=16", "--config.train.eval_every=5", "--config.train.eval_tokens=256"),
    *("--config.train.sample_tokens=8", "--config.checkpoint.every=10", "--config.log.every=5"),
    *("--config.optim.warmup_steps=5", "--config.log.tensorboard=false"),
]
# A model that is traced and compiled in a third of the time, for what holds of every model.
PLAIN = ("--config.model.preset=gpt2", "--config.model.heads=2", "--config.train.sample_tokens=0")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["to be ", "or not ", "that is\n", "nobler "], 1500)
    path.write_text("".join(words))
    return path


def run(program, *arguments):
    """Run a program's main in this process, as its command line would."""
    return program.main(["program", *map(str, arguments)])


def run_train(workdir, text, *more):
    return run(train, *SMALL, f"--config.data.source={text}", f"--workdir={workdir}", *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    run_train(workdir, text)
    return workdir


def error_of(program, *arguments, capsys):
    """What a failing command prints: one line, but for the name of what it read; exit status 1."""
    argv, sys.argv = sys.argv, ["program", *map(str, arguments)]
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run(program.main)
    finally:
        sys.argv = argv
    assert stopped.value.code == 1
    printed = re.sub(r"^checkpoint: .*\n", "", capsys.readouterr().err)
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


def train_error(text, tmp_path, capsys, *more):
    data = f"--config.data.source={text}"
    return error_of(train, *SMALL, data, f"--workdir={tmp_path}", *more, capsys=capsys)


def rows_of(workdir):
    """metrics.jsonl without what depends on the clock."""
    drop = metrics.OF_THE_MACHINE
    return [{k: v for k, v in row.items() if k not in drop} for row in metrics.read(workdir)]


def test_run_leaves_everything_it_promises(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["train"]["steps"] == 20
    assert [row["step"] for row in metrics.read(finished)] == [5, 10, 15, 20]
    for row in metrics.read(finished):
        assert row["validation_loss"] > 0 and row["tokens"] == 64 and len(row["gate"]) == 1
    assert "after 20 steps" in (finished / "samples.txt").read_text()
    assert (finished / "curve.png").stat().st_size > 10_000
    assert checkpoint.find(f"{finished}@last").name == "20"


def test_resumed_run_equals_one_that_went_straight_through(
    finished, text, tmp_path, capsys, monkeypatch
):
    """A SIGTERM in step 10 saves and leaves cleanly; the same command continues, to the bit."""

    prefetch = train.prefetch

    def interrupted(*args):
        for step, batch in enumerate(prefetch(*args), start=1):
            if step == 10:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(train, "prefetch", interrupted)
        run_train(tmp_path, text)
    assert "stopped by SIGTERM after step 10; the same command continues" in capsys.readouterr().out
    run_train(tmp_path, text)
    assert "resuming at step 10" in capsys.readouterr().out
    assert rows_of(tmp_path) == rows_of(finished)
    (_, one, _), (_, other, _) = (gt_jax.load(f"{run}@last") for run in (tmp_path, finished))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_run_out_of_time_stops_after_a_step_and_continues(text, tmp_path, capsys, no_curve):
    for step in (1, 2):
        run_train(tmp_path, text, *PLAIN, "--config.train.max_minutes=1e-6")
        expected = f"stopped by train.max_minutes=1e-06 after step {step}; the same command"
        printed = capsys.readouterr().out
        assert expected in printed and "tokens/s" not in printed  # the only step compiles
        assert checkpoint.find(f"{tmp_path}@last").name == str(step)
    more = ("--config.train.steps=4", "--config.train.max_minutes=60")
    run_train(tmp_path, text, *PLAIN, *more)
    printed = capsys.readouterr().out
    assert "resuming at step 2" in printed and "step 4 after" in printed


def test_finished_run_says_so_and_can_go_on_longer(finished, text, capsys):
    run_train(finished, text)
    assert "holds a finished run of 20 steps" in capsys.readouterr().out


def test_resuming_with_another_config_names_the_field(finished, text, capsys):
    error = train_error(text, finished, capsys, "--config.optim.lr=0.5")
    assert "optim.lr=0.5 differs from 0.003" in error and "another --workdir" in error


def test_evaluate_agrees_with_the_last_evaluation_of_training(finished, text, capsys):
    run(evaluate, f"--checkpoint={finished}", f"--source={text}")
    run(evaluate, f"--checkpoint={finished}@last")
    whole, held_out = re.findall(r"loss (\d+\.\d+) nats/character", capsys.readouterr().out)
    assert float(whole) > 0
    # Training looked at the first 256 tokens of the same split.
    last = metrics.read(finished)[-1]["validation_loss"]
    assert float(held_out) == pytest.approx(last, rel=0.05)


def test_generate_continues_the_prompt(finished, capsys):
    arguments = f"--checkpoint={finished}", "--prompt=to be", "--max_tokens=12", "--seed=3"
    texts = []
    for _ in range(2):
        run(generate, *arguments)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("to be") and len(texts[0]) == len("to be") + 12 + 1


def test_loaded_model_gives_logits_and_state(finished):
    model, params, tokenizer = gt_jax.load(finished)
    output = jax.jit(model.apply)({"params": params}, tokenizer.encode("to be")[None])
    assert output.logits.shape == (1, 5, tokenizer.vocab_size)


def test_model_runs_where_its_implementation_does_not(finished, tmp_path):
    """One trained by the kernels of a GPU, on this machine."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    about = checkpoint.find(tmp_path) / "about" / "metadata"
    written = about.read_text()
    assert '"impl": "auto"' in written
    about.write_text(written.replace('"impl": "auto"', '"impl": "mosaic"'))
    checkpoint.seal(about.parents[1])
    assert gt_jax.load(tmp_path)[0].config.impl == "auto"


def test_patience_ends_a_run_early(text, tmp_path, capsys, no_curve):
    still = ["--config.optim.lr=1e-30", "--config.train.patience=2", "--config.train.eval_every=2"]
    run_train(tmp_path, text, *PLAIN, *still)
    printed = capsys.readouterr().out
    assert "stopped early by train.patience=2" in printed and "at step 2, last" in printed
    assert checkpoint.find(f"{tmp_path}@last").name == "6"


@pytest.mark.parametrize("log_every", [1, 1000])
def test_run_that_stays_not_finite_ends_with_one_line(log_every, text, tmp_path, capsys):
    """The limit holds between the lines of the log, too."""
    broken = ["--config.optim.lr=1e30", "--config.optim.clip=0", "--config.train.max_nonfinite=3"]
    broken += ["--config.optim.warmup_steps=0", f"--config.log.every={log_every}"]
    broken += ["--config.train.eval_every=0", "--config.checkpoint.every=0"]
    error = train_error(text, tmp_path, capsys, *PLAIN, *broken)
    assert "train.max_nonfinite=3" in error and "lower optim.lr" in error
    assert re.search(r"the last [345] steps were not finite", error)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.preset=gf-mg", "model.preset='gf-mg' must be one of"),
        ("--config.optim.lrr=1", "optim.lrr is not a config field; did you mean 'optim.lr'?"),
        ("--config.optm.lr=1", "optm.lr is not a config field; did you mean 'optim.lr'?"),
        ("--config.train.steps=many", "--config.train.steps=many"),
        ("--config.model.dim=2.5", "--config.model.dim=2.5"),
        ("--config.optim.grad_accumulation=3", "must be a multiple of optim.grad_accumulation=3"),
        ("--config.data.order=random", "data.order='random' must be one of windows, tracks"),
        ("--config.train.seq_len=100000", "train.seq_len=100000"),
        ("--config.train.sample_prompt=Ω", "train.sample_prompt='Ω'"),
        ("--config.data.source=nowhere.txt", "data.source"),
        ("--config.model.impl=mosiac", "did you mean 'mosaic'?"),
        ("--config.model.impl=mosaic", "model.impl=mosaic: "),
        ("--workdr=x", "--workdr is not a flag; did you mean 'workdir'?"),
        ("--lr=3e-4", "--lr is not a flag; did you mean --config.optim.lr=...?"),
        ("--config.optim.learning_rate=1", "did you mean 'optim.lr'?"),
        ("--config.lr=1", "lr is not a config field; did you mean 'optim.lr'?"),
        ("--config.model.layers=1025", "model.layers=1025 must be at most 1024"),
        ("--config.model.state_size=100000", "model.state_size=100000 must be at most 1024"),
        ("--config.model.fusion=ws2", "model.fusion='ws2' must be one of"),
        ("--config.train.batch_size=2147483647", "tokens a step, more than 2,147,483,647"),
        ("--config.model.dim=100000", "model.dim=100000 with model.layers=1 makes"),
        ("configs/tiny.py", "did you mean --config=configs/tiny.py?"),
        ("stray", "stray is not a flag"),
    ],
)  # fmt: skip
def test_mistake_on_the_command_line_is_one_line(argument, message, text, tmp_path, capsys):
    assert message in train_error(text, tmp_path, capsys, argument)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_positions_that_cannot_fit_are_named(text, tmp_path, capsys):
    many = ("--config.model.preset=gpt2", "--config.model.max_positions=2000000000")
    printed = train_error(text, tmp_path, capsys, *many)
    assert "and model.max_positions=2000000000 makes" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"abc \xff\xfe", "UTF-8"), (b"too short", "seq_len")],
)
def test_unusable_text_is_one_line(content, message, tmp_path, capsys):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    assert message in train_error(file, tmp_path / "run", capsys)


def test_missing_config_or_checkpoint_is_one_line(tmp_path, capsys):
    assert "--config is missing" in error_of(train, capsys=capsys)
    assert "nowhere.py" in error_of(train, "--config=nowhere.py", capsys=capsys)
    for program, more in ((evaluate, []), (generate, ["--prompt=a"])):
        error = error_of(program, f"--checkpoint={tmp_path}", *more, capsys=capsys)
        assert "holds no checkpoint; give a run's workdir" in error
    (tmp_path / "model.safetensors").touch()
    for exported in (tmp_path, tmp_path / "model.safetensors"):
        error = error_of(generate, f"--checkpoint={exported}", "--prompt=a", capsys=capsys)
        assert f"python -m gt_jax.convert import {exported} DST" in error
    assert "--checkpoint is missing" in error_of(generate, "--prompt=a", capsys=capsys)


def test_loading_a_damaged_or_foreign_checkpoint_is_one_line_and_nothing_is_lost(
    finished, text, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = (workdir / "metrics.jsonl").read_text()
    folder = checkpoint.find(workdir)
    largest = max((folder / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    largest.write_bytes(largest.read_bytes()[:100])
    error = error_of(generate, f"--checkpoint={workdir}", "--prompt=a", capsys=capsys)
    assert "is cut off" in error and "use an earlier one" in error
    # The model another checkpoint was written for: same config, other parameters.
    shutil.rmtree(workdir / "checkpoints")
    shutil.copytree(finished / "checkpoints", workdir / "checkpoints")
    about = folder / "about" / "metadata"
    about.write_text(about.read_text().replace('"dim": 32', '"dim": 64'))
    checkpoint.seal(folder)
    error = error_of(generate, f"--checkpoint={workdir}", "--prompt=a", capsys=capsys)
    assert "model.dim=64, and its files hold an embedding [13, 32]" in error
    assert (workdir / "metrics.jsonl").read_text() == before


def test_prompt_outside_the_vocabulary_names_the_characters(finished, capsys):
    error = error_of(generate, f"--checkpoint={finished}", "--prompt=Ωmega", capsys=capsys)
    assert "'Ω'" in error


def test_module_runs_from_the_shell_without_a_traceback():
    """The whole way once, as `python -m`: exit status, stderr, and --verbose for the rest."""
    command = [sys.executable, "-m", "gt_jax.train", "--config=configs/tiny.py"]
    command.append("--config.train.batch_size=0")
    short = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (short.returncode, short.stdout) == (1, "")
    assert short.stderr == "error: train.batch_size=0 must be at least 1\n"
    long = subprocess.run(
        [*command, "--verbose"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert long.returncode == 1 and "Traceback" in long.stderr


def test_failure_is_one_line_even_where_unfinished_writes_complain():
    program = """
from gt_jax import cli

async def write():
    pass

def main(argv):
    unfinished = write()
    raise OSError("no room")

cli.run(main)
"""
    short = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (short.returncode, short.stderr) == (1, "error: no room\n")


def test_resuming_with_another_text_of_the_same_length_is_refused(text, tmp_path, capsys, no_curve):
    """Same name, length and alphabet: only the hash of the tokens tells."""
    copy, few = tmp_path / "text.txt", (*PLAIN, "--config.train.steps=2")
    written = text.read_text()
    copy.write_text(written)
    run_train(tmp_path / "run", copy, *few)
    copy.write_text(written[::-1])
    error = train_error(copy, tmp_path / "run", capsys, *few, "--config.train.steps=3")
    assert "is no longer the text" in error and "bring it back" in error

    # A checkpoint of before there were hashes is continued, and says that nothing was compared.
    about = checkpoint.find(f"{tmp_path}/run@last") / "about" / "metadata"
    stored = json.loads(about.read_text())
    about.write_text(json.dumps({name: stored[name] for name in stored if name != "text"}))
    checkpoint.seal(about.parents[1])
    run_train(tmp_path / "run", copy, *few, "--config.train.steps=3")
    assert "kept no hash of its text; not compared" in capsys.readouterr().out


def test_nan_at_the_first_evaluation_does_not_stay_the_best(
    text, tmp_path, monkeypatch, capsys, no_curve
):
    usual, calls = train.evaluate, []

    def first_is_nan(*args, **kwargs):
        calls.append(usual(*args, **kwargs))
        return calls[-1] | ({"validation_loss": float("nan")} if len(calls) == 1 else {})

    monkeypatch.setattr(train, "evaluate", first_is_nan)
    run_train(tmp_path, text, *PLAIN, "--config.train.steps=10")
    assert re.search(r"best validation loss \d", capsys.readouterr().out)
    rows = metrics.read(tmp_path)
    assert rows[0]["validation_loss"] is None and rows[1]["validation_loss"] > 0
