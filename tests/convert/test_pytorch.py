"""Every model of ours leaves as a folder that torch alone and transformers run."""

import dataclasses
import functools
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gt_jax
from gt_jax import checkpoint, config, convert
from gt_jax.convert import card, export_model, files, import_model, modeling
from gt_jax.convert.layout import read_params
from gt_jax.convert.tokenizer_files import tokenizer_files
from gt_jax.data.corpora import Corpus
from gt_jax.data.hugging_face import HuggingFaceTokenizer
from gt_jax.data.pretrained import IdTokenizer, read_tokenizer
from gt_jax.data.tokenizers import make_tokenizer
from gt_jax.errors import InputError
from gt_jax.models import FUSIONS, ModelConfig, fusion, make_model
from tests.convert import small
from tests.models.small_models import (
    KINDS,
    Small,
    jit,
    lively_parameters,
    random_tokens,
    small_config,
)

torch = pytest.importorskip("torch", reason="runs what is exported")
pytest.importorskip("safetensors", reason="holds the exported weights")
transformers = pytest.importorskip("transformers", reason="runs what is exported")

PROMPT, CONTINUED = 20, 64
TOLERANCE = 1e-4  # of the largest logit; float32 on both sides, other orders of summation
PURE = {k: f | {"max_positions": PROMPT + CONTINUED} for k, f in KINDS.items() if "arch" in str(f)}
FUSED = {name: {"fusion": name} for name in FUSIONS}
TWINS = {kind: {"branches": kind} for kind in ("rwkv+rwkv", "mamba+mamba")}
LEGACY = {f"legacy-{v}": {"branch": "legacy", "legacy_wkv": v} for v in ("a", "b1", "b2", "c")}
OTHERS = {
    "ranks, heads and groups": {"mix_rank": 3, "mamba_head_dim": 8, "mamba_groups": 2},
    "twin-debate": {"fusion": "mingru", "residual": "mamba", "post_norm": True},
    "both residual": {"residual": "both", "fusion": "pscan", "branch_epsilon": 1e-3},
    "mamba2 with feed-forward": {"architecture": "mamba2", "mamba_feed_forward": True},
    "no feed-forward": {"feed_forward": False, "tie_embeddings": False},
}
# One block each but for the families, which tell a first block from others.
ONE_BLOCK = {case: f | {"layers": 1} for case, f in (FUSED | TWINS | LEGACY | OTHERS).items()}
CASES = PURE | ONE_BLOCK | {"gf": {"fusion": "gf"}}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """case -> (Small, the folder that it was exported to)."""
    root = tmp_path_factory.mktemp("exported")
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(root / "modules")
    torch.set_num_threads(1)

    @functools.cache
    def export(case):
        model = make_model(small_config(**CASES[case], impl="reference"))
        of_case = Small(model, lively_parameters(model, random_tokens(1, 1)), jit(model.apply))
        folder = root / f"folder{len(list(root.iterdir()))}"
        tokenizer = IdTokenizer(of_case.model.config.vocab_size)
        ours = root / f"{folder.name}-ours"
        checkpoint.save_model(ours, of_case.model.config, of_case.params, tokenizer)
        export_model(ours, folder, layout="pytorch")
        return of_case, folder

    return export


def load_alone(folder):
    """The model by the file in the folder, which finds no transformers."""
    spec = importlib.util.spec_from_file_location("alone", folder / modeling.FILE)
    module = importlib.util.module_from_spec(spec)
    present = sys.modules["transformers"]
    sys.modules["transformers"] = None
    try:
        spec.loader.exec_module(module)
        return module.load(folder)
    finally:
        sys.modules["transformers"] = present


def load_transformers(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )


@torch.no_grad()
def greedy(model, prompt):
    """The tokens of a prompt and CONTINUED more, and the logits of all but the last."""
    tokens, (logits, state) = prompt, model(prompt)
    for _ in range(CONTINUED):
        token = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, token], dim=1)
        step, state = model(token, state)
        logits = torch.cat([logits, step], dim=1)
    return tokens, logits[:, :-1]


@pytest.mark.parametrize("case", CASES)
def test_prompt_and_carried_steps_give_our_logits_and_text(export, case):
    ours, folder = export(case)
    prompt = torch.tensor(np.random.default_rng(1).integers(0, 17, (1, PROMPT)))
    tokens, theirs = greedy(load_alone(folder), prompt)
    logits = ours.apply({"params": ours.params}, jnp.asarray(tokens[:, :-1].numpy())).logits
    largest = np.abs(logits).max()
    assert largest > 1  # far from trivial
    assert np.abs(logits - theirs.numpy()).max() < TOLERANCE * largest
    np.testing.assert_array_equal(logits[0, PROMPT - 1 :].argmax(-1), tokens[0, PROMPT:])

    generated = load_transformers(folder).generate(prompt, max_new_tokens=16, do_sample=False)
    assert generated.tolist() == tokens[:, : PROMPT + 16].tolist()


@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_comes_back_with_the_same_bits(export, case):
    ours, folder = export(case)
    found = files.read(folder)
    name, of_folder, unset = convert._recognise(found)
    assert (name, unset) == ("pytorch", [])
    assert of_folder == dataclasses.replace(ours.model.config, impl="auto")
    params = read_params(convert.LAYOUTS[name], of_folder, found.tensors)
    small.assert_same(params, jax.device_get(ours.params))


# What generate() does besides.


@pytest.fixture(scope="module")
def model(export):
    return load_transformers(export("gru")[1])


def test_padding_on_either_side_leaves_no_trace(model):
    texts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    tokens = torch.tensor([texts[0], [0, 0, *texts[1]]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for row, text in zip(together, texts):
        alone = model.generate(torch.tensor([text]), max_new_tokens=9, do_sample=False)
        assert row[-9:].tolist() == alone[0, -9:].tolist()

    with torch.no_grad():
        right = model(tokens.flip(1), attention_mask=mask.flip(1)).logits[1, :3]
        assert torch.allclose(right, model(tokens.flip(1)[1:, :3]).logits[0], atol=1e-5)
        with pytest.raises(ValueError, match="leaves out every token of a row"):
            model(tokens, attention_mask=torch.zeros_like(mask))


def test_beam_search_carries_the_state_of_the_beams_that_it_keeps(model):
    """The score of what it finds is that of the whole text read at once."""
    found = model.generate(
        torch.tensor([[3, 1, 4]]),
        num_beams=4,
        max_new_tokens=12,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        scores = model(found.sequences[:, :-1]).logits[0].log_softmax(-1)
    text = found.sequences[0, 3:]
    assert len(text) == 12
    assert float(found.sequences_scores[0]) == pytest.approx(
        float(scores[2:].gather(1, text[:, None]).sum()), abs=1e-3
    )


def test_labels_give_the_mean_cross_entropy_and_its_gradient(model):
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    output = model(tokens, labels=tokens)
    chosen = output.logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
    assert output.loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("case", ["gf", "rwkv6", "gpt2", "legacy-a"])
def test_a_model_runs_in_bfloat16(export, case):
    tokens = torch.tensor(np.random.default_rng(2).integers(0, 17, (2, 30)))
    whole = load_transformers(export(case)[1])(tokens).logits
    half = load_transformers(export(case)[1], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half(tokens).logits - whole).abs().max() < 0.05 * whole.abs().max()


def test_what_transformers_saves_again_is_still_ours(export, tmp_path):
    ours, folder = export("gf")
    load_transformers(folder).save_pretrained(tmp_path / "again")
    import_model(tmp_path / "again", tmp_path / "back")
    _, params, tokenizer = gt_jax.load(tmp_path / "back")
    small.assert_same(jax.device_get(params), jax.device_get(ours.params))
    assert tokenizer.to_dict() == IdTokenizer(17).to_dict()


# The file itself.


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_what_its_model_uses_and_lines_that_fit(export, case):
    text = (export(case)[1] / modeling.FILE).read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 100
    config = export(case)[0].model.config
    has = lambda name: f"class {name}(" in text
    attention, hybrid = config.position_limit is not None, config.architecture == "hybrid"
    assert has("Attention") == attention
    assert has("Mamba2") == ("mamba" in config.branches if hybrid else "mamba2" in case)
    assert [name for name in FUSIONS if has(FUSIONS[name].__name__)] == [config.fusion] * hybrid


def test_a_fusion_or_a_setting_without_a_pytorch_form_is_refused_in_one_line(monkeypatch):
    class Unwritten(fusion.Gate):
        pass

    monkeypatch.setitem(FUSIONS, "new", Unwritten)
    with pytest.raises(
        InputError, match=r"^--format=pytorch: model.fusion='new' has no PyTorch .*"
    ):
        modeling.modeling_file(ModelConfig(17, fusion="new"), "")
    field = ("twist", int, dataclasses.field(default=0))
    twisted = dataclasses.make_dataclass("T", [field], bases=(ModelConfig,), frozen=True)
    with pytest.raises(InputError, match=r"model.twist=3 has no PyTorch form; it needs 0"):
        modeling.modeling_file(twisted(17, twist=3), "")


# What stands beside it.


def test_the_card_has_data_loss_command_and_licence(tmp_path, monkeypatch):
    folder = tmp_path / "my_run" / "checkpoints" / "40"
    folder.mkdir(parents=True)
    settings = config.to_dict(config.Config())
    settings["optim"] |= {"lr": 1e-3, "ema": 0.9}
    settings["optim"]["lr_multipliers"] |= {"rwkv": 2.0}
    about = {"step": 40, "config": settings}
    monkeypatch.setattr(card.checkpoint, "find", lambda source: folder)
    monkeypatch.setattr(card.checkpoint, "read_about", lambda folder: about)
    rows = [{"step": 40, "validation_loss": 1.75}, {"step": 50, "validation_loss": 1.5}]
    (tmp_path / "my_run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nx")
    command = {"command": "/usr/bin/python3 -m gt_jax.train --config=gf_mh"}
    (tmp_path / "my_run" / "provenance.jsonl").write_text(json.dumps(command))
    text = card.model_card(
        "runs/x", ModelConfig(17), IdTokenizer(17), licence="apache-2.0", has_tokenizer=True
    )
    for part in (
        "license: apache-2.0",
        "# my_run",
        "Data: shakespeare, 163,840 tokens in 40 steps of 64 x 64",
        "Validation loss: 1.7500 nats a token",
        "\nCommand:\n\n    python -m gt_jax.train --config=gf_mh\n",
        "- Optimizer: `optim.name=adamw`, `optim.lr=0.001`, `optim.schedule=cosine`, "
        "`optim.warmup_steps=50`, `optim.weight_decay=0.1`, `optim.clip=1.0`, `optim.ema=0.9`, "
        "`optim.lr_multipliers.rwkv=2.0`\n",
        "Hybrid of RWKV-6 and Mamba-2 by fusion gf, 8 blocks of width 128: ",
        "Weights: apache-2.0.",
    ):
        assert part in text, part


TEXTS = ["To be, or not", "  two  spaces\n\nnew line ", "é ▁ 中 \U0001f600", ""]
CORPUS = Corpus("a", ("To be, or not to be: that is the question.\n é" * 20,), ("To be",))


@pytest.mark.parametrize("kind", ["char", "char97", "sentencepiece"])
def test_transformers_reads_the_tokenizer_of_a_corpus(tmp_path, kind):
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece", reason="trains the tokenizer")
    ours = make_tokenizer(kind, CORPUS, vocab_size=300)
    for name, text in tokenizer_files(ours).items():
        (tmp_path / name).write_text(text, "utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(
        read_tokenizer(tmp_path / "tokenizer.json", tmp_path, 400), HuggingFaceTokenizer
    )
    special = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert special == ours.special[:3]
    for text in TEXTS if kind != "char" else TEXTS[:1]:
        ids = theirs(text).input_ids
        assert ids == ours.encode(text).tolist()
        if kind == "sentencepiece":
            assert theirs.decode(ids) == ours.decode(ids)
    if kind == "char":
        assert theirs.decode(theirs(TEXTS[0]).input_ids) == TEXTS[0]


def test_ids_of_special_tokens_are_the_tokenizer_s_or_null(export):
    stored = json.loads((export("gf")[1] / "config.json").read_text())
    assert [stored[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
