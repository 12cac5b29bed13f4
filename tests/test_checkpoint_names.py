"""RUN, RUN@best, RUN@last, RUN@STEP and RUN@STEP+STEP are what they say; wrong ones say why."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gt_jax
from gt_jax import checkpoint, evaluate, generate, inspect, serve
from gt_jax.convert import export_model
from gt_jax.data.tokenizers import CharTokenizer
from gt_jax.errors import InputError
from gt_jax.models import make_config, make_model

STEPS, BEST = (3, 5, 80), 5


def save_run(workdir, *, progress):
    """A run of the checkpoints STEPS; the parameters of each are the first's plus its step."""
    config = make_config("mamba2", vocab_size=3, dim=32, layers=1, state_size=8, dtype="float32")
    model = make_model(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    for step in STEPS:
        folder = workdir / checkpoint.FOLDER / str(step)
        shifted = jax.tree.map(lambda x, step=step: x + step, params)
        checkpoint.save_model(folder, config, shifted, CharTokenizer("abc"))
        about = folder / "about" / "metadata"
        written = json.loads(about.read_text()) | {"step": step, "progress": progress}
        about.write_text(json.dumps(written))
        checkpoint.seal(folder)
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "x"
    return save_run(folder, progress={"best_step": BEST, "best_loss": 1.25})


def of_step(run, step):
    return gt_jax.load(run / checkpoint.FOLDER / str(step))[1]


@pytest.mark.parametrize(
    ("name", "step"), [("", BEST), ("@best", BEST), ("@last", 80), ("@3", 3), ("@80", 80)]
)
def test_name_is_that_checkpoint(run, name, step):
    assert checkpoint.find(f"{run}{name}") == run / checkpoint.FOLDER / str(step)
    said = []
    _, params, _ = gt_jax.checkpoint.load(f"{run}{name}", say=said.append)
    jax.tree.map(np.testing.assert_array_equal, params, of_step(run, step))
    assert len(said) == 1 and f"step {step}" in said[0]


def test_name_of_several_is_the_mean_of_their_parameters(run):
    said = []
    _, params, _ = checkpoint.load(f"{run}@80+3+5", say=said.append)
    one, *others = [jax.tree.map(np.float64, of_step(run, step)) for step in STEPS]
    mean = jax.tree.map(lambda *x: sum(x) / 3, one, *others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, mean)
    assert said == [f"checkpoint: {run}, the mean of steps 3 and 5 and 80"]


def test_best_is_said_beside_the_last(run):
    assert checkpoint.choose(run).said == (
        f"{run}, step 5, the best (validation loss 1.2500); the last is step 80"
    )


def test_run_without_a_best_is_its_last_and_says_why(tmp_path):
    for loss in (None, float("nan")):
        run = save_run(tmp_path / str(loss), progress={"best_step": None, "best_loss": loss})
        folders, said = checkpoint.choose(run)
        assert folders[0].name == "80" and said.endswith("the last: no finite evaluation yet")
        with pytest.raises(InputError, match="no finite evaluation yet; there are @best, @last"):
            checkpoint.find(f"{run}@best")
    run = save_run(tmp_path / "moved", progress={"best_step": 4, "best_loss": 1.0})
    assert checkpoint.choose(run).said.endswith("the last: the best, step 4, is gone")


@pytest.mark.parametrize("name", ["4", "3+4", "", "3+", "007", "-1", "beast", "9" * 5000, "3,5"])
def test_wrong_name_is_one_line_with_what_exists(run, name):
    with pytest.raises(InputError) as refused:
        checkpoint.load(f"{run}@{name}")
    said = str(refused.value)
    assert "there are @best, @last and @3, @5, @80" in said and "\n" not in said
    assert ("did you mean 'best'?" in said) == (name == "beast")


@pytest.mark.parametrize("program", [generate, serve, evaluate, inspect, export_model])
def test_every_program_refuses_a_wrong_name_in_one_line(run, tmp_path, program):
    arguments = {generate: ["--prompt=ab"], evaluate: ["--source=x.txt"], inspect: ["--text=abc"]}
    with pytest.raises(InputError) as refused:
        if program is export_model:
            export_model(f"{run}@beast", tmp_path / "out", layout="mamba2-hf")
        else:
            program.main(["", f"--checkpoint={run}@beast", *arguments.get(program, [])])
    assert str(refused.value) == (
        f"{run} has no checkpoint @beast; did you mean 'best'?; "
        "there are @best, @last and @3, @5, @80"
    )
    assert not (tmp_path / "out").exists()


def test_folder_with_an_at_sign_is_that_folder(run, tmp_path):
    at_home = tmp_path / "me@home"
    at_home.symlink_to(run)
    assert checkpoint.find(at_home).name == str(BEST)
    assert checkpoint.find(f"{at_home}@last").name == "80"
    with pytest.raises(InputError, match="not a run; leave out @last"):
        checkpoint.find(f"{run}/checkpoints/3@last")


def test_programs_say_which_checkpoint_they_read(run, tmp_path, capsys):
    generate.main(["", f"--checkpoint={run}", "--prompt=ab", "--max_tokens=2"])
    printed = capsys.readouterr()
    assert printed.out.startswith("ab") and "step 5, the best" in printed.err
    (tmp_path / "text.txt").write_text("abcabc")
    evaluate.main(["", f"--checkpoint={run}@3+5", f"--source={tmp_path / 'text.txt'}"])
    assert "the mean of steps 3 and 5" in capsys.readouterr().err
    inspect.main(["", f"--checkpoint={run}@last", "--text=abc"])
    assert "step 80, the last" in capsys.readouterr().err and (run / "inspect.html").is_file()
    assert "step 5, the best" in export_model(run, tmp_path / "out", layout="mamba2-hf")
