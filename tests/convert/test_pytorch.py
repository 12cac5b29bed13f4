"""Every model of ours leaves as a folder that torch alone and transformers run."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gt_jax
from gt_jax import checkpoint
from gt_jax.convert import export_model, import_model, modeling
from gt_jax.data.pretrained import IdTokenizer
from gt_jax.models import FUSIONS
from tests.convert import small
from tests.models.small_models import KINDS, small_model

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
        of_case = small_model("gf", **CASES[case])
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
def test_an_exported_model_comes_back_with_the_same_bits(export, tmp_path, case):
    ours, folder = export(case)
    import_model(folder, tmp_path / "back")
    model, params, tokenizer = gt_jax.load(tmp_path / "back")
    assert model.config == ours.model.config
    small.assert_same(jax.device_get(params), jax.device_get(ours.params))
    assert tokenizer.to_dict() == IdTokenizer(17).to_dict()
