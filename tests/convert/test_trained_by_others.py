"""Models that others' code trained: PyTorch's autograd on an RWKV-6 of its own, and transformers.

Trained weights have what random ones lack: decays near 0 and 1, sharp softmaxes, large logits. A
few hundred steps teach both models a sentence; then every logit and 200 greedy tokens must agree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gt_jax
from gt_jax.convert import import_model
from gt_jax.models.layers import project
from gt_jax.training import lora
from tests.models.small_models import jit

torch = pytest.importorskip("torch", reason="trains the models")
nn, F = torch.nn, torch.nn.functional

SENTENCE = "the same wind that bends the reed breaks the oak, and the reed outlives the oak. "
ALPHABET = sorted(set(SENTENCE))
TEXT = torch.tensor([ALPHABET.index(c) for c in SENTENCE * 40])
PROMPT, GREEDY = 20, 200
WIDTH, HEADS, BLENDS, DECAYS = 32, 2, 3, 7  # ranks that no official model has


def train(model, logits_of, steps, seq_len=20, batch=8):
    """The loss after `steps` of Adam on excerpts of TEXT with one character in ten replaced."""
    torch.set_num_threads(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        starts = torch.randint(len(TEXT) - seq_len, (batch, 1))
        tokens = TEXT[starts + torch.arange(seq_len + 1)]
        noise = torch.randint(len(ALPHABET), tokens.shape)
        tokens = torch.where(torch.rand(tokens.shape) < 0.1, noise, tokens)
        loss = F.cross_entropy(logits_of(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def greedy(logits_of):
    """The tokens of a prompt and GREEDY more, and the logits that chose them.

    The text itself is the draft. Its first token that the model would not choose is replaced until
    there is none, which takes fewer passes than choosing one token after another.
    """
    tokens = TEXT[None, : PROMPT + GREEDY].clone()
    while True:
        logits = logits_of(tokens)
        chosen = logits[0, PROMPT - 1 : -1].argmax(-1)
        wrong = (chosen != tokens[0, PROMPT:]).nonzero()
        if not len(wrong):
            return tokens.numpy(), logits.numpy()
        tokens[0, PROMPT + wrong[0]] = chosen[wrong[0]]


def assert_ours_agree(folder, tokens, theirs):
    model, params, _ = gt_jax.load(folder)
    ours = np.asarray(jit(model.apply)({"params": params}, jnp.asarray(tokens)).logits)
    assert np.abs(theirs).max() > 5  # trained, so sure of itself
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    np.testing.assert_array_equal(ours[0, PROMPT - 1 : -1].argmax(-1), tokens[0, PROMPT:])


class Finch(nn.Module):
    """RWKV-6 as its paper has it (arXiv:2404.05892, section 4), a token at a time.

    Parameters are a dict by RWKV-LM's names.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers, self.p, D = layers, {}, WIDTH
        new = lambda *shape, scale=0.2: nn.Parameter(scale * torch.randn(shape))
        ones = lambda: nn.Parameter(torch.ones(D))
        self.p |= {"emb.weight": new(len(ALPHABET), D), "head.weight": new(len(ALPHABET), D)}
        norms = ["ln_out", "blocks.0.ln0"]
        for i in range(layers):
            att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
            norms += [f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"{att}ln_x"]
            for name in "xwkvrg":
                self.p[f"{att}time_maa_{name}"] = nn.Parameter(torch.rand(1, 1, D))
            self.p |= {
                f"{att}time_maa_w1": new(D, 5 * BLENDS),
                f"{att}time_maa_w2": new(5, BLENDS, D),
                f"{att}time_decay": nn.Parameter(torch.linspace(-6, 1, D).reshape(1, 1, D)),
                f"{att}time_decay_w1": new(D, DECAYS),
                f"{att}time_decay_w2": new(DECAYS, D),
                f"{att}time_faaaa": new(HEADS, D // HEADS),
                f"{ffn}time_maa_k": nn.Parameter(torch.rand(1, 1, D)),
                f"{ffn}time_maa_r": nn.Parameter(torch.rand(1, 1, D)),
                f"{ffn}key.weight": new(96, D),  # 3.5 x 32, down to a multiple of 32
                f"{ffn}receptance.weight": new(D, D),
                f"{ffn}value.weight": new(D, 96),
            }
            for name in ("receptance", "key", "value", "gate", "output"):
                self.p[f"{att}{name}.weight"] = new(D, D)
        for name in norms:
            self.p |= {f"{name}.weight": ones(), f"{name}.bias": new(D)}
        self.all = nn.ParameterList(self.p.values())

    def norm(self, x, name):
        return F.layer_norm(x, (WIDTH,), self.p[f"{name}.weight"], self.p[f"{name}.bias"], 1e-5)

    def forward(self, tokens):
        x = self.norm(F.embedding(tokens, self.p["emb.weight"]), "blocks.0.ln0")
        for i in range(self.layers):
            x = x + self.time_mix(self.norm(x, f"blocks.{i}.ln1"), f"blocks.{i}.att.")
            x = x + self.channel_mix(self.norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.ffn.")
        return self.norm(x, "ln_out") @ self.p["head.weight"].T

    def time_mix(self, x, at):
        p = {name.removeprefix(at): value for name, value in self.p.items() if at in name}
        B, T, D = x.shape
        shift = F.pad(x, (0, 0, 1, -1)) - x
        blend = lambda name, more: x + shift * (p[f"time_maa_{name}"] + more)
        low = torch.tanh(blend("x", 0) @ p["time_maa_w1"]).split(BLENDS, dim=-1)
        inputs = {n: blend(n, low[i] @ p["time_maa_w2"][i]) for i, n in enumerate("wkvrg")}
        omega = p["time_decay"]
        omega = omega + torch.tanh(inputs["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
        heads = lambda z: z.reshape(B, T, HEADS, -1)
        matrices = {"r": "receptance", "k": "key", "v": "value"}
        r, k, v = (heads(inputs[n] @ p[f"{m}.weight"].T) for n, m in matrices.items())
        w, u = heads(torch.exp(-torch.exp(omega))), p["time_faaaa"][None, :, :, None]
        S, y = torch.zeros(B, HEADS, D // HEADS, D // HEADS), []
        for t in range(T):
            kv = k[:, t, :, :, None] * v[:, t, :, None]
            y.append((r[:, t, :, :, None] * (S + u * kv)).sum(2))
            S = w[:, t, :, :, None] * S + kv
        y = torch.stack(y, dim=1).reshape(B * T, D)
        y = F.group_norm(y, HEADS, p["ln_x.weight"], p["ln_x.bias"], 64e-5).reshape(B, T, D)
        return (y * F.silu(inputs["g"] @ p["gate.weight"].T)) @ p["output.weight"].T

    def channel_mix(self, x, at):
        shift = F.pad(x, (0, 0, 1, -1)) - x
        x_k, x_r = (x + shift * self.p[f"{at}time_maa_{name}"] for name in "kr")
        k = torch.relu(x_k @ self.p[f"{at}key.weight"].T) ** 2
        receptance = torch.sigmoid(x_r @ self.p[f"{at}receptance.weight"].T)
        return receptance * (k @ self.p[f"{at}value.weight"].T)


def test_rwkv6_trained_by_another_s_code_with_low_ranks_of_its_own(tmp_path):
    torch.manual_seed(0)
    model = Finch(layers=2)
    assert train(model, model, steps=150) < 1.5  # of 3.0 nats for a guess
    tensors = {name: value.detach() for name, value in model.p.items()}
    torch.save(tensors, tmp_path / "finch.pth")
    import_model(tmp_path / "finch.pth", tmp_path / "ours")
    found = gt_jax.load(tmp_path / "ours")[0].config
    assert (found.mix_rank, found.decay_rank) == (BLENDS, DECAYS)
    assert_ours_agree(tmp_path / "ours", *greedy(model))


def test_mamba2_trained_by_transformers_with_groups_and_small_heads(tmp_path):
    transformers = pytest.importorskip("transformers", reason="trains the model")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=len(ALPHABET),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        state_size=8,
        chunk_size=12,
    )
    model = transformers.Mamba2ForCausalLM(config)
    logits_of = lambda tokens: model(tokens, use_cache=False).logits
    assert train(model, logits_of, steps=150) < 1.5
    model.eval().save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    found = gt_jax.load(tmp_path / "ours")[0].config
    assert (found.mamba_groups, found.mamba_head_dim, found.state_size) == (2, 16, 8)
    assert_ours_agree(tmp_path / "ours", *greedy(logits_of))


def test_a_matrix_with_adapters_computes_what_torch_does():
    """LoRA's formula as its users write it beside an nn.Linear, and its gradients."""
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(0, 0.3, s).astype("f") for s in ((5, 24), (24, 16), (24, 4), (4, 16)))
    pair = {lora.A: jnp.asarray(a), lora.B: jnp.asarray(b)}
    params = {"kernel": jnp.asarray(w), lora.KEY: {"scale": jnp.float32(2), "kernel": pair}}
    ours, grads = jax.value_and_grad(
        lambda p: jnp.sum(jnp.tanh(project(jnp.asarray(x), lora.merged(p)["kernel"])))
    )(params)
    linear = torch.nn.Linear(24, 16, bias=False)
    linear.weight.data = torch.tensor(w.T.copy())
    down, up = (torch.tensor(m.T.copy(), requires_grad=True) for m in (a, b))
    inputs = torch.tensor(x)
    theirs = torch.tanh(linear(inputs) + 8 / 4 * (inputs @ down.T @ up.T)).sum()
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    for name, other in ((lora.A, down), (lora.B, up)):
        of_ours = grads[lora.KEY]["kernel"][name]
        np.testing.assert_allclose(of_ours, other.grad.numpy().T, rtol=1e-4, atol=1e-5)
