"""Config files: found by path or name from any folder, and a mistake in one is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from gt_jax.config import default_config
from gt_jax.config_files import find_config, folder, load_config
from gt_jax.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["gf_mh", "gf_mh.py", "configs/gf_mh.py"])
def test_a_config_of_ours_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == folder() / "gf_mh.py"
    assert load_config(name).to_dict() == load_config("base").to_dict()


def test_a_file_of_that_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = "from gt_jax.config import default_config\ndef get_config():\n  c = default_config()\n"
    (tmp_path / "configs" / "gf_mh.py").write_text(own + "  c.seed = 7\n  return c\n")
    assert load_config("configs/gf_mh.py").seed == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n  pass\n", "line 1: "),
        ("import nowhere_to_be_found\n", "line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n", "it defines no get_config()"),
        ("def get_config():\n  return {'seed': 1}\n", "get_config() returned dict"),
        ("def get_config():\n  return None\n", "get_config() returned NoneType"),
        ("def get_config():\n\n  return 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("raise SystemExit\n", "line 1: SystemExit"),
        ("import sys\ndef get_config():\n  sys.exit(0)\n", "line 3: SystemExit: 0"),
        ("raise GeneratorExit\n", "line 1: GeneratorExit"),
        ("raise ValueError('\\n\\x1b[31m a')\n", "line 1: ValueError: \\x1b[31m a"),
        ("x = 1\0\n", "mine.py: source code"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()\n",
            "get_config() returned no ",
        ),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_with_its_place(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(str(path))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["", ".", "configs", "configs/."])
def test_what_names_no_file_is_refused(name):
    with pytest.raises(InputError, match=f"^--config={name} is not a file; by name there are"):
        find_config(name)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"--config=gf_mg is not a file; did you mean 'gf_mh'\?"):
        load_config("gf_mg")
    with pytest.raises(InputError, match="by name there are base, cp, gf"):
        load_config("nothing/like/it.py")


def test_help_of_train_lists_every_setting_with_its_meaning():
    text = subprocess.run(
        [sys.executable, "-m", "gt_jax.train", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    from gt_jax.config import Config, flatten, from_config_dict, to_dict

    for name in flatten(to_dict(from_config_dict(default_config()))):
        assert f"--config.{name}=" in text
    assert "peak learning rate" in text
    assert from_config_dict(default_config()) == Config()
