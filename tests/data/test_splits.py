"""Folders whose names say what trains and what validates."""

import gzip
import json

import pytest

from gt_jax.data import load_corpus
from gt_jax.errors import InputError


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (["train.txt", "valid.txt", "test.txt"], ["train.txt"], ["valid.txt"]),
        (["Train.txt", "DEV.txt"], ["Train.txt"], ["DEV.txt"]),
        (["train.txt", "validation.jsonl.gz"], ["train.txt"], ["validation.jsonl.gz"]),
        (["ptb.train.txt", "ptb.val.txt", "ptb.test.txt"], ["ptb.train.txt"], ["ptb.val.txt"]),
        (
            ["train/b.txt", "train/a.txt", "test/a.txt", "val/c.txt"],
            ["train/a.txt", "train/b.txt"],
            ["val/c.txt"],
        ),
        (
            ["train-00000-of-00002.txt", "train-00001-of-00002.txt", "validation-00000-of-1.txt"],
            ["train-00000-of-00002.txt", "train-00001-of-00002.txt"],
            ["validation-00000-of-1.txt"],
        ),
        (["train_en.txt", "test_en.txt", "valid_en.txt"], ["train_en.txt"], ["valid_en.txt"]),
        (["train.en.txt", "dev.en.txt"], ["train.en.txt"], ["dev.en.txt"]),
        (["Train split.txt", "Valid split.txt"], ["Train split.txt"], ["Valid split.txt"]),
        (["trainset.txt", "testset.txt", "devset.txt"], ["trainset.txt"], ["devset.txt"]),
        (
            ["split=train/a.txt", "split=test/a.txt", "split=validation/a.txt"],
            ["split=train/a.txt"],
            ["split=validation/a.txt"],
        ),
    ],
)
def test_a_folders_named_splits_are_kept_and_test_is_never_read(
    write, tmp_path, names, train, validation
):
    for name in names:
        text = f"{name} says so"
        line = gzip.compress(json.dumps({"text": text}).encode())
        write(f"set/{name}", line if name.endswith(".gz") else text)
    corpus = load_corpus(str(tmp_path / "set"))
    assert corpus.train == tuple(f"{name} says so" for name in train)
    assert corpus.validation == tuple(f"{name} says so" for name in validation)
    trains = train[0] if len(train) == 1 else "2 files of train"
    left_out = [f"; {name} is left out" for name in names if "test" in name]
    expected = f"trains on {trains}, validates on {validation[0]}{''.join(left_out)}"
    assert corpus.note == expected


def test_a_folder_of_train_and_test_validates_on_the_end_of_train(write, tmp_path):
    write("set/train.txt", "0123456789" * 10)
    write("set/test.txt", "x" * 100)
    corpus = load_corpus(str(tmp_path / "set"))
    assert (
        "".join(corpus.train + corpus.validation) == "0123456789" * 10
        and len(corpus.validation[0]) == 10
    )
    assert corpus.note == "trains on train.txt, validates on the end of it; test.txt is left out"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.txt", "notes.txt"], "holds train.txt, and notes.txt, which no split is named for"),
        (["a.txt", "test.txt"], "holds test.txt, and a.txt, which no split is named for"),
        (["valid.txt", "test.txt"], "holds test.txt and nothing to train on"),
        (["train/test.txt", "train/a.txt"], "holds train/test.txt, which names train and test"),
        (["train.txt", "val.txt", "dev.txt"], "holds dev and val, both for validation"),
        (["train.txt", "train.jsonl"], "holds train.jsonl and train.txt, which may be one text"),
    ],
)
def test_a_folder_whose_names_leave_open_what_trains_is_refused(write, tmp_path, names, message):
    for name in names:
        write(f"set/{name}", '{"text": "a"}')
    with pytest.raises(InputError) as error:
        load_corpus(str(tmp_path / "set"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_that_only_begin_like_a_splits_are_texts(write, tmp_path):
    several = ["test_of_time.txt", "stress-test.txt", "the-dev.txt", "trains.txt"]
    for folder, names in (("one", several), ("two", ["train_by_night.txt", "planes.txt"])):
        for name in names:
            write(f"{folder}/{name}", name)
        corpus = load_corpus(str(tmp_path / folder))
        assert len(corpus.train + corpus.validation) == len(names) and corpus.note is None
