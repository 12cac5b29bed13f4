"""A corpus out of pinned packages, with pip but without a network."""

import hashlib
import json
import re
import zipfile

import pytest

from gt_jax.data import load_corpus
from gt_jax.data.packages import HELD_OUT, PACKAGES, build_corpus
from gt_jax.errors import InputError

LONG = "x = 1  # a line of a program\n" * 9


def write_wheel(folder, name, files):
    """A wheel of one package. Returns its line of requirements."""
    about = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: MIT\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {
        f"{about}/METADATA": metadata,
        f"{about}/WHEEL": wheel,
        f"{about}/RECORD": "",
        f"{about}/licenses/LICENSE.txt": f"Permission is granted by {name}.",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    lines = [
        write_wheel(tmp_path / "wheels", "one", {"one/a.py": LONG + "a", "one/b.py": LONG + "b"}),
        write_wheel(
            tmp_path / "wheels",
            "networkx",
            {"n/copy.py": LONG + "a", "n/own.py": LONG + "é", "n/no.py": "", "n/data.csv": LONG},
        ),
    ]
    (tmp_path / "packages.txt").write_text("".join(lines))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "packages.txt"


def test_sources_are_split_by_package_and_kept_once(packages, tmp_path):
    about = build_corpus(tmp_path / "out", packages, say=lambda line: None)
    corpus = load_corpus(str(tmp_path / "out"))
    assert corpus.train == (LONG + "b",)  # what is held out stays out of training
    assert corpus.validation == (LONG + "a", LONG + "é")
    rows = {row["name"]: row for row in about["packages"]}
    assert rows["one"] | {"files": 1, "repeated": 1, "licence": "MIT"} == rows["one"]
    assert about == json.loads((tmp_path / "out" / "sources.json").read_text())
    assert about["bytes"] == 3 * len(LONG) + 4
    assert "Permission is granted by one." in (tmp_path / "out" / "LICENSES").read_text()
    again = build_corpus(tmp_path / "again", packages, say=lambda line: None)
    assert again["sha256"] == about["sha256"]
    with pytest.raises(InputError, match="out is there already; name a folder to make"):
        build_corpus(tmp_path / "out", packages)


def test_another_wheel_than_the_pinned_one_is_refused(packages, tmp_path):
    write_wheel(tmp_path / "wheels", "one", {"one/a.py": LONG + "other"})
    with pytest.raises(InputError, match=r"pip cannot download .* HASH") as found:
        build_corpus(tmp_path / "out", packages, say=lambda line: None)
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


def test_every_package_of_the_list_is_pinned_and_some_are_held_out():
    lines = [x for x in PACKAGES.read_text().splitlines() if not x.startswith("#")]
    pinned = re.compile(r"([a-z0-9-]+)==[\w.]+ --hash=sha256:[0-9a-f]{64}")
    names = [pinned.fullmatch(line)[1] for line in lines]
    assert HELD_OUT.keys() <= set(names) and len(set(names)) == len(names) >= 20
