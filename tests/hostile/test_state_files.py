"""Mutated state files: each gives a context of the model's shapes, or an InputError."""

import io
import json
import zipfile

import jax
import numpy as np
import pytest

from gt_jax import archives
from gt_jax.errors import InputError
from gt_jax.generation import contexts, load_context, prefill, save_context
from tests.hostile.mutations import ODD_VALUES, bounded, mutate, mutate_json
from tests.models.small_models import random_tokens, small_model

FILES = 500  # of each of the three kinds


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, parameters, a state file's bytes)."""
    small = small_model("gf")
    path = tmp_path_factory.mktemp("saved") / "state"
    tokens = np.asarray(random_tokens(1, 30)[0])
    save_context(path, small.model, small.params, prefill(small.model, small.params, tokens))
    return small.model, small.params, path.read_bytes()


@pytest.fixture
def load(saved, quick_folder, monkeypatch):
    """Reads bytes as a state file: whether they were one."""
    model, params, whole = saved
    digest = contexts.fingerprint(params)
    monkeypatch.setattr(contexts, "fingerprint", lambda _: digest)
    path = quick_folder / "state"
    path.write_bytes(whole)
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), load_context(path, model, params).state)

    def load(data):
        path.write_bytes(data)
        try:
            context = load_context(path, model, params)
        except InputError as error:
            assert str(error).isprintable()
            return False
        assert jax.tree.map(lambda x: (x.shape, x.dtype), context.state) == wanted
        assert context.seen.dtype == bool and context.seen[context.waiting].all()
        assert context.length >= len(context.waiting) > 0
        return True

    return load


def test_mutated_files(saved, load):
    rng = np.random.default_rng(0)
    assert load(saved[2])
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            load(mutate(rng, saved[2]))


def pack(parts):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def unpack(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_mutated_arrays_with_right_checksums(saved, load):
    parts, rng = unpack(saved[2]), np.random.default_rng(1)
    names = list(parts)
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            name = names[rng.integers(len(names))]
            head, rest = parts[name][:200], parts[name][200:]
            load(pack(parts | {name: mutate(rng, head, most=2) + rest}))


def test_mutated_descriptions(saved, load):
    parts, rng = unpack(saved[2]), np.random.default_rng(2)
    about = json.loads(str(np.load(io.BytesIO(parts["about.npy"]))))
    with bounded() as next_file:
        for i in range(FILES):
            next_file()
            changed = mutate_json(rng, about)
            if i % 4 == 0:
                changed["length"] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
            array = io.BytesIO()
            np.save(array, json.dumps(changed))
            load(pack(parts | {"about.npy": array.getvalue()}))


def test_compressed_arrays_are_refused_unread(saved, load, tmp_path):
    """40 MB of zeros take 40 kB as np.savez_compressed writes them; nothing bounds how many."""
    parts = unpack(saved[2])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10_000_000,)}
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
        with archive.open("more.npy", "w") as large:
            large.write(header.getvalue())
            large.write(bytes(40_000_000))
    assert len(file.getvalue()) < len(saved[2]) + 100_000
    assert not load(file.getvalue())
    (tmp_path / "state").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="another kind of zip file"):
        archives.arrays(tmp_path / "state")


@pytest.mark.parametrize(
    ("shape", "descr"),
    [((10**12,), "<f4"), ((2**62, 2**62), "<f4"), ((3,), "|O"), ((-1,), "<f4"), ((9,), "<c16")],
)
def test_arrays_that_claim_more_than_they_have_are_refused_unread(tmp_path, shape, descr):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    path = tmp_path / "a.npz"
    path.write_bytes(pack({"a.npy": header.getvalue() + bytes(12)}))
    with pytest.raises(ValueError, match="does not fit its 12 bytes"):
        archives.arrays(path)
