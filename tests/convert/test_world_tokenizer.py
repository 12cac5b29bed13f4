"""RWKV's World vocabulary in an exported folder, read by transformers' AutoTokenizer."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from gt_jax import checkpoint
from gt_jax.convert import export_model
from gt_jax.data.pretrained import WORLD_FILE, WorldTokenizer
from gt_jax.models import ModelConfig, make_model

transformers = pytest.importorskip("transformers", reason="reads what is exported")
pytest.importorskip("safetensors", reason="holds the exported weights")
package = importlib.util.find_spec("rwkv")
if package is None:
    pytest.skip("the rwkv package brings the vocabulary", allow_module_level=True)

TEXTS = (
    "",
    "The quick brown fox\n\n\tjumps  over 1234567 dogs.\r\n",
    "Ünïcödé, naïve café; Ελληνικά, русский текст, עברית, العربية مرحبا",
    "हिन्दी में पाठ, ภาษาไทย, 日本語の文章。한국어 문장, 你好世界",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff\x00\x7f \U0010ffff",
    "<|rwkv_tokenizer_end_of_text|><|endoftext|> def f(x): return x  # ok",
    "\nUser: hi\n\nAssistant:",
)


@pytest.fixture(scope="module")
def ours():
    file = Path(package.origin).parent / WORLD_FILE
    return WorldTokenizer(WorldTokenizer.pack(file.read_text("utf-8")))


@pytest.fixture(scope="module")
def model(ours, tmp_path_factory):
    """A folder for `gt_jax.load`, of one small block."""
    folder = tmp_path_factory.mktemp("world") / "model"
    config = ModelConfig(65536, "rwkv6", dim=16, layers=1, heads=1, tie_embeddings=False)
    init = lambda: make_model(config).init(jax.random.key(0), np.zeros((1, 1), int))["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(init))
    checkpoint.save_model(folder, config, zeros, ours)
    return folder


@pytest.mark.parametrize("layout", ["pytorch", "rwkv-hf"])
def test_auto_tokenizer_gives_our_ids_and_texts(layout, model, ours, tmp_path, monkeypatch):
    """Also from the folder that it saves itself to."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    export_model(model, tmp_path / "there", layout=layout)
    load = transformers.AutoTokenizer.from_pretrained
    theirs = load(tmp_path / "there", trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    for read in (theirs, load(tmp_path / "again", trust_remote_code=True)):
        assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (0, 0, 0)
        assert len(read) == len(read.get_vocab()) == len(ours._bytes)
        for text in TEXTS:
            ids = read(text).input_ids
            assert ids == ours.encode(text).tolist()
            assert read.decode(ids) == ours.decode(ids) == text
    # Halves of characters, ends of text, ids of nothing.
    for ids in np.random.default_rng(0).integers(0, 65536, (50, 20)).tolist():
        ids = [*ids, 0, 65535]
        assert theirs.decode(ids) == ours.decode(ids)
    if layout == "pytorch":
        card = (tmp_path / "there" / "README.md").read_text()
        assert 'AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)' in card
        assert "modeling_gt_jax.py` and `tokenization_rwkv_world.py`" in card
    batch = theirs(["a b c d e", "a"], padding=True)
    assert batch.input_ids[1][-1] == 0 and batch.attention_mask[1][-1] == 0
