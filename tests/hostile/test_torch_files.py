"""Mutated torch.save files: each ends in arrays of the file's own bytes, or in an InputError."""

import pickle
import pickletools
import zipfile

import numpy as np
import pytest

from gt_jax.convert import pickles, pth
from gt_jax.errors import InputError
from tests.hostile.mutations import bounded, mutate

FILES = 4000  # of each of the two kinds
PROGRAMS = 2500


def state_dict(path):
    """A file as torch.save writes it for a module: views, a parameter, attributes."""
    plain, name = pth._plain, pth._global
    ordered = pth._call(name("collections", "OrderedDict"))

    def tensor(key, kind, size, offset, shape, strides):
        storage = pth._tuple(plain("storage"), name("torch", kind), *map(plain, (key, "cpu", size)))
        return pth._call(
            name("torch._utils", "_rebuild_tensor_v2"),
            storage + pickle.BINPERSID,
            *map(plain, (offset, shape, strides, False)),
            ordered,
        )

    whole = tensor("0", "FloatStorage", 12, 0, (3, 4), (4, 1))
    items = {
        "whole": whole,
        "view": tensor("0", "FloatStorage", 12, 1, (2, 3), (1, 4)),
        "half": tensor("1", "BFloat16Storage", 6, 0, (6,), (1,)),
        "parameter": pth._call(
            name("torch._utils", "_rebuild_parameter"), whole, pickle.NEWTRUE, ordered
        ),
    }
    content = b"".join(plain(key) + value for key, value in items.items())
    attributes = plain({"_metadata": {"": {"version": 1}}})
    program = b"\x80\x02" + ordered + pickle.MARK + content + pickle.SETITEMS
    program += attributes + pickle.BUILD + pickle.STOP
    rng = np.random.default_rng(5)
    storages = {"0": rng.bytes(48), "1": rng.bytes(12)}
    write(path, program, storages)
    return program, storages


def write(path, program, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)


def read_all(path) -> int:
    """How many tensors the file gives; each number must stand in the file."""
    try:
        tensors = pth.read(path)
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
    except InputError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return 0
    data = path.read_bytes()
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (tensors[name].shape, tensors[name].dtype)
        assert array.nbytes <= len(data)
        assert all(number.tobytes() in data for number in array.ravel())
    return len(arrays)


def test_whole_file_is_read(tmp_path):
    state_dict(tmp_path / "a.pth")
    assert read_all(tmp_path / "a.pth") == 4


def test_mutated_files(quick_folder):
    path, rng = quick_folder / "a.pth", np.random.default_rng(0)
    state_dict(path)
    whole = path.read_bytes()
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            path.write_bytes(mutate(rng, whole))
            read_all(path)


def test_mutated_pickles_in_whole_files(quick_folder):
    """Their checksums are right, so that the interpreter sees every fault."""
    path, rng = quick_folder / "a.pth", np.random.default_rng(1)
    program, storages = state_dict(path)
    read = 0
    with bounded() as next_file:
        for _ in range(FILES):
            next_file()
            write(path, mutate(rng, program, most=1), storages)
            read += read_all(path) > 0
    assert read > FILES / 50  # many faults leave a valid description of other tensors


def test_random_programs(quick_folder):
    """Operations and their arguments in random order, as no pickler writes them."""
    path, rng = quick_folder / "a.pth", np.random.default_rng(2)
    program, storages = state_dict(path)
    words = operations(program) + [pickle.dumps(x, 2)[2:-1] for x in (0, -1, 2**62, "0", (1,))]
    words += [b"0", b"2", b"\x81", b"R", b"b", b"Q", b"(", b"t", b"h\0", b"q\0", b"\x94", b"c"]
    with bounded() as next_file:
        for _ in range(PROGRAMS):
            next_file()
            chosen = rng.integers(len(words), size=rng.integers(1, 60))
            body = b"".join(words[i] for i in chosen)
            prefix = program[: rng.integers(len(program))] if rng.random() < 0.7 else b"\x80\x02"
            write(path, prefix + body + b".", storages)
            read_all(path)


def operations(program):
    """The bytes of each operation of a pickle."""
    places = [place for _, _, place in pickletools.genops(program)]
    return [program[a:b] for a, b in zip(places, [*places[1:], len(program)])]


REPEAT = 1 << 20
SHARING = b"]q\0" + b"](h\0h\0eq\0" * 60  # lists that print as 2^60 of them


@pytest.mark.parametrize(
    "program",
    [
        b"(" * REPEAT + b".",  # marks
        b"]" * REPEAT + b"a" * (REPEAT - 1) + b".",  # lists in lists
        b")" + b"\x85" * REPEAT + b".",  # tuples in tuples
        b"}" + b"X\1\0\0\0k}" * (REPEAT // 8) + b"s" * (REPEAT // 8) + b".",  # dicts in dicts
        b"]q\0" + b"h\0a" * REPEAT + b".",  # a list that holds itself
        b"}q\0X\1\0\0\0kh\0s.",  # a dict that holds itself
        b"(" + b"K\1" * REPEAT + b"t.",  # a long tuple
        b"}(" + b"X\1\0\0\0kK\1" * REPEAT + b"u.",  # one name, many times
        b"N" + b"\x94" * REPEAT + b".",  # a memo of many places
        b"\x8a\xff" + b"\x7f" * 255 + b".",  # a number of 2040 bits
        b"X\xff\xff\xff\xff",  # text of 4 GB, none of it there
        b"}X\1\0\0\0k}X\1\0\0\0j}ssc__builtin__\neval\n.",
        SHARING + b"h\0h\0\x93.",  # to be imported
        SHARING + b"h\0Q.",  # for a storage
        SHARING + b"}h\0h\0s.",  # for a name
        SHARING + b"ctorch._utils\n_rebuild_tensor_v2\n(h\0h\0h\0h\0tR.",
    ],
    ids=range(16),
)
def test_programs_out_of_proportion_end_quickly(tmp_path, program):
    path = tmp_path / "a.pth"
    write(path, b"\x80\x02" + program, {})
    with bounded():
        assert read_all(path) == 0


def test_a_pickle_cannot_change_the_size_of_a_storage(tmp_path):
    """BUILD sets attributes of whatever is on the stack: of a storage, its size and its file."""
    plain, name = pth._plain, pth._global
    storage = pth._tuple(
        plain("storage"), name("torch", "FloatStorage"), *map(plain, ("0", "cpu", 4))
    )
    grown = storage + pickle.BINPERSID + plain({"size": 1 << 40}) + pickle.BUILD
    arguments = map(plain, (0, (1 << 20,), (1,), False, None))
    tensor = pth._call(name("torch._utils", "_rebuild_tensor_v2"), grown, *arguments)
    program = b"\x80\x02}(" + plain("a") + tensor + b"u."
    write(tmp_path / "a.pth", program, {"0": bytes(16)})
    with pytest.raises(InputError, match="its pickle changes a Storage, not a dict"):
        pth.read(tmp_path / "a.pth")


def test_tensors_that_repeat_one_storage_have_a_bound(tmp_path):
    """A small file cannot become any number of large arrays."""
    plain, name = pth._plain, pth._global
    storage = pth._tuple(
        plain("storage"), name("torch", "FloatStorage"), *map(plain, ("0", "cpu", 1000))
    )
    numbers = map(plain, (0, (1000,), (1,), False, None))
    tensor = pth._call(
        name("torch._utils", "_rebuild_tensor_v2"), storage + pickle.BINPERSID, *numbers
    )
    items = b"".join(plain(f"t{i}") + tensor for i in range(100))
    write(tmp_path / "a.pth", b"\x80\x02}(" + items + b"u.", {"0": bytes(4000)})
    with pytest.raises(InputError, match="more than 8 times the file's numbers"):
        pth.read(tmp_path / "a.pth")


def test_zip_that_lists_too_many_files_is_not_opened(tmp_path):
    path = tmp_path / "a.pth"
    state_dict(path)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 12 : end + 16] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"list of files has 1,073,741,824 bytes"):
        pth.read(path)


def test_steps_have_a_bound():
    program = b"\x80\x02" + b"N0" * pickles.MOST_STEPS
    with pytest.raises(ValueError, match="its pickle holds POP, which tensors do not need"):
        pickles.load(program, (), None)
    with pytest.raises(ValueError, match=r"its pickle takes over 1,000,000 steps"):
        pickles.load(b"\x80\x02" + b"N" * (pickles.MOST_STEPS + 2) + b".", (), None)
