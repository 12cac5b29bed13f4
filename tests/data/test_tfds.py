"""Data sets of TFDS, without TensorFlow."""

import pytest

from gt_jax.data import corpora, load_corpus
from gt_jax.errors import InputError


@pytest.fixture(scope="module")
def tfds(tmp_path_factory):
    """TFDS with two small sets, prepared on disk in the format that needs no TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPlays(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        SPLITS = ("train", "test")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.SPLITS}

        def _generate_examples(self, split):
            for i in range(5):
                yield i, {"text": f"{split} {i} é"}

    class TinyPlaysUnsplit(TinyPlays):
        SPLITS = ("train",)

    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyPlays, TinyPlaysUnsplit):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(folder)
    return tfds


def test_tfds_keeps_the_splits_a_set_has(tfds):
    corpus = load_corpus("tfds:tiny_plays")
    assert sorted(corpus.train) == [f"train {i} é" for i in range(5)]
    assert sorted(corpus.validation) == [f"test {i} é" for i in range(5)]


def test_tfds_without_a_validation_split_is_split_by_document(tfds):
    corpus = load_corpus("tfds:tiny_plays_unsplit")
    assert (len(corpus.train), len(corpus.validation)) == (4, 1)


def test_tfds_names_the_fields_a_set_has(tfds):
    with pytest.raises(
        InputError, match=r"data.source=.* data.field='body'; name one of its fields: text"
    ):
        load_corpus("tfds:tiny_plays", field="body")


def test_tfds_offline_is_refused_at_once_with_what_works_offline(tfds, monkeypatch):
    monkeypatch.setattr(corpora, "_is_online", lambda: False)
    with pytest.raises(InputError, match=r"needs the network; .*shakespeare or a file path"):
        load_corpus("tfds:tiny_shakespeare")


def test_a_failed_preparation_says_why(tfds, monkeypatch):
    def fail(self):
        raise OSError("the disk is full\nand more")

    monkeypatch.setattr(corpora, "_is_online", lambda: True)
    builder = type(tfds.builder("tiny_shakespeare"))
    monkeypatch.setattr(builder, "download_and_prepare", fail)
    with pytest.raises(InputError, match=r"could not be prepared \(the disk is full\); try again"):
        load_corpus("tfds:tiny_shakespeare")


@pytest.mark.parametrize("name", ["no_such_set", "tiny_shakespeare/no_such_config"])
def test_an_unknown_tfds_name_is_refused(tfds, name):
    with pytest.raises(InputError, match=rf"data.source='tfds:{name}' is not known to TFDS") as e:
        load_corpus(f"tfds:{name}")
    assert "\n" not in str(e.value)
