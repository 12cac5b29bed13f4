"""Fixtures of the tests of corpora."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache, in an empty place; it does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gt_jax"


@pytest.fixture
def write(tmp_path):
    """write(name, text or bytes) -> path as a string."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write
