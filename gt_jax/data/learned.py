"""Tokenizers trained on a sample of a source of any size."""

from collections.abc import Iterable, Iterator

from gt_jax.data.base import SpecialIds, Tokenizer
from gt_jax.data.hugging_face import HuggingFaceTokenizer
from gt_jax.data.reading import Document, documents
from gt_jax.data.sentence_piece import THREADS, train_sentencepiece
from gt_jax.data.sources import Plan
from gt_jax.data.tokenizers import CharTokenizer, TaggedCharTokenizer
from gt_jax.errors import InputError

END_OF_TEXT = "<|endoftext|>"
_SAMPLE = {"bpe": 1 << 26, "sentencepiece": 1 << 24}  # characters to train on
LEARNED = ("bpe", "sentencepiece", "char", "char97")


def train_tokenizer(
    kind: str, source: str, work: Plan, *, vocab_size: int, field: str
) -> Tokenizer:
    """Trains a tokenizer on the training units of a source, the same one every time.

    Args:
        kind: one of LEARNED. BPE and SentencePiece read the beginning of every unit, up to 64 and
            16 million characters together; characters come from the whole source.
        source: as `gt_jax.data.sources.plan` took it.
        work: what that returned.
        vocab_size: of BPE and SentencePiece.
        field: where text is in JSON objects and tables.

    Raises:
        InputError: the source cannot be read, or cannot support vocab_size.
    """
    if kind in _SAMPLE:
        sample = _sample(source, work, field, _SAMPLE[kind])
        try:
            if kind == "bpe":
                return train_bpe(sample, vocab_size)
            return train_sentencepiece(sample, vocab_size, threads=THREADS)
        except InputError as error:
            raise InputError(str(error).removeprefix("data.")) from error
    alphabet = set()
    for block in _blocks(source, work, field):
        alphabet.update(block)
    return CharTokenizer(alphabet) if kind == "char" else TaggedCharTokenizer(alphabet)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Trains byte-level BPE as GPT-2's: every text has ids, and decodes to itself.

    Args:
        texts: to train on.
        vocab_size: ids, with the 256 bytes and id 0, which ends a document; fewer where the text
            has no more pairs that occur twice.

    Raises:
        InputError: vocab_size has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise InputError(f"vocab_size={vocab_size} must be at least 257: the bytes and the end")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(made.to_str(), SpecialIds(eos=0))


def _sample(source: str, work: Plan, field: str, size: int) -> Iterator[str]:
    """The beginning of every training unit, `size` characters in all where there are so many."""
    units = [unit for unit in work.units if unit.split == "train"]
    for unit in units:
        left = max(size // len(units), 1)
        for block in _blocks(source, work._replace(units=[unit]), field):
            yield block[:left]
            left -= len(block)
            if left <= 0:
                break


def _blocks(source: str, work: Plan, field: str) -> Iterator[str]:
    """Blocks of text of all documents."""
    for unit in work.units:
        for part in unit.ranges:
            for item in documents(source, part, field, lambda size: None):
                if isinstance(item, Document):
                    yield from item.blocks
