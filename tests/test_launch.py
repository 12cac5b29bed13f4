"""A process runs a command if nothing else can have changed its code: told by its launcher."""

import base64
import hashlib
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from gt_jax import launch


@pytest.fixture
def script(tmp_path, monkeypatch):
    """An installed script that is the main module, and the record of it."""
    path = tmp_path / "gt-jax"
    path.write_text("from gt_jax.__main__ import main\nmain()\n")
    digest = hashlib.sha256(path.read_bytes()).digest()
    value = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    record = SimpleNamespace(
        name="gt-jax", hash=SimpleNamespace(mode="sha256", value=value), locate=lambda: path
    )
    monkeypatch.setattr(launch, "files", lambda package: [record])
    main = SimpleNamespace(__spec__=None, __file__=str(path))
    monkeypatch.setitem(sys.modules, "__main__", main)
    return path


@pytest.mark.parametrize("name", ["gt_jax.train", "gt_jax.__main__"])
def test_modules_of_the_command_run_it(monkeypatch, name):
    main = SimpleNamespace(__spec__=SimpleNamespace(name=name))
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert launch.runs("gt_jax.train") and not launch.runs("other.train")


def test_script_counts_as_the_installer_wrote_it(script):
    assert launch.runs("gt_jax.train")
    script.write_text("import patches\n" + script.read_text())
    assert not launch.runs("gt_jax.train")


def test_script_of_the_user_does_not_count(script, tmp_path, monkeypatch):
    own = tmp_path / "own" / "gt-jax"
    own.parent.mkdir()
    own.write_bytes(script.read_bytes())
    for file in (str(own), str(tmp_path / "absent"), None):
        sys.modules["__main__"].__file__ = file
        assert not launch.runs("gt_jax.train")

    def unknown(package):
        raise PackageNotFoundError(package)

    sys.modules["__main__"].__file__ = str(script)
    monkeypatch.setattr(launch, "files", unknown)
    assert not launch.runs("gt_jax.train")
