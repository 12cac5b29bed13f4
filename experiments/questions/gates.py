"""Is a trained model sound: kernels, outputs, gradients, learning, and is it better than counting?

    python -m experiments gates --checkpoint=runs/gf_mh
    python -m experiments gates --checkpoint=converted/rwkv --source=book.txt
    python -m experiments gates --checkpoint runs/0 runs/1 runs/2 --out=gates.json

Every gate gives a number and says pass, warn or fail by the band printed beside it; the exit status
is 1 if any fails. Several checkpoints, of the same model from other seeds, give mean and interval,
and the worst of their verdicts. Of the trained weights:

    G0   what the implementation in use makes of a text, beside the reference implementation's
    G1   finite logits, of the right shape
    G3.5 cosine between memories 64 tokens apart: a frozen memory has 1 (mean over blocks and rows)
    G4   gradients of RWKV's tensors over Mamba's, mean norms, on one held-out batch (hybrids)
    naive baseline  held-out loss beside that of counted pairs and of counted single tokens

Of new weights of the same architecture, another seed's for each checkpoint, under
the default optimizer:

    G2   entropy of the untrained model's guess, as a share of the vocabulary's
    G3   some steps on the text: the loss must fall; mean gradient norm before clipping
    overfit  ten sequences of 64 tokens, learned by heart
"""

import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import command, formats, results
from experiments.lab.programs import stacked
from experiments.lab.statistics import estimate
from gt_jax import checkpoint
from gt_jax.analysis import memories
from gt_jax.config import from_stored
from gt_jax.data import encode_corpus, evaluation_batches, load_corpus, make_batches
from gt_jax.errors import InputError
from gt_jax.models import make_model
from gt_jax.training import backend, optimizer
from gt_jax.training.evaluation import evaluate
from gt_jax.training.optimizer import make_optimizer, make_schedule
from gt_jax.training.step import init_state, make_eval_step, make_train_step, summed_loss
from gt_jax.training.text import read_text

LENGTH = 64  # tokens in a row
ROWS = 10
STEPS, OVERFIT_STEPS = 100, 500
RATE = 1e-3  # of new models
INF = math.inf
VERDICTS = ("none", "pass", "warn", "fail")


class Gate(NamedTuple):
    """A gate's number, the ranges in which it passes or warns, and the verdict."""

    name: str
    about: str
    value: float | None  # None where the gate does not apply
    good: tuple[float, float]
    fair: tuple[float, float]

    @property
    def title(self):
        """What to find it by: the name, without the numbers in brackets, of one text."""
        return f"{self.name}: {self.about.split(' (')[0]}"

    @property
    def verdict(self):
        """Ends count as inside; what is not a number fails."""
        if self.value is None:
            return "none"
        for verdict, (low, high) in (("pass", self.good), ("warn", self.fair)):
            if low <= self.value <= high:
                return verdict
        return "fail"


def main(argv=None):
    parser = command.plain_parser("gates", __doc__)
    parser.set_defaults(quick=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        help="one or several; a run without a name is its last",
    )
    parser.add_argument("--source", help="text, as data.source; default: that of the run")
    parser.add_argument("--out", type=Path, help="a JSON file for the gates")
    options = command.parse(parser, argv)
    options.seeds = range(len(options.checkpoint))
    for path in options.checkpoint:
        checkpoint.find(named(path))  # what is not there is said now
    backend.prepare()
    rows, measures, failed = [], {}, False
    for gates in zip(*(gates_of(options, i) for i in options.seeds)):
        gate, values = gates[0], [g.value for g in gates]
        value = estimate(values) if len(gates) > 1 and None not in values else gate.value
        verdict = max((g.verdict for g in gates), key=VERDICTS.index)
        rows.append([gate.name, gate.about, value, band(gate), verdict])
        measures |= {gate.title: value, f"{gate.title}, verdict": verdict}
        failed |= verdict == "fail"
    found = results.table("Gates", ["gate", "number", "", "band", ""], rows)
    if options.out:
        about = {"checkpoints": options.checkpoint}
        results.write(options, settings=about, measures=measures, tables=[found])
    else:
        print(formats.as_text(found))
    return int(failed)


def named(path):
    """A run without the name of a checkpoint is its last one."""
    folder, name = checkpoint.split_name(path)
    return f"{path}@last" if name is None and checkpoint.steps(folder) else path


def gates_of(options, i):
    """All gates of a checkpoint."""
    path = options.checkpoint[i]
    model, params, tokenizer = checkpoint.load(named(path))
    train, held_out = texts(path, options.source, tokenizer)
    parts = (of_trained(model, params, train, held_out), of_untrained(model, train, seed=i))
    with ThreadPoolExecutor(len(parts)) as pool:  # programs compile side by side
        return [gate for part in pool.map(list, parts) for gate in part]


def texts(path, source, tokenizer):
    """Token ids of the run's own split, or of one tenth of the source held out."""
    about = checkpoint.read_about(checkpoint.find(named(path)))["config"]
    if source is None and "data" not in about:
        raise InputError(
            f"--source is missing: {path} is a converted model and has no text of its own; name a "
            "file"
        )
    if source is None:
        tokens = read_text(from_stored(about), tokenizer=tokenizer).tokens
    else:
        tokens = encode_corpus(load_corpus(source, validation_fraction=0.1), tokenizer)
    needed = 2 * ROWS * LENGTH + 1  # two batches
    if min(sum(map(len, part)) for part in (tokens.train, tokens.validation)) < needed:
        raise InputError(f"the text must have {needed} tokens to train on and {needed} held out")
    return tokens.train, tokens.validation


def of_trained(model, params, train, held_out):
    """G0, G1, G3.5, G4 and the naive baseline."""
    shape = {"batch_size": ROWS, "seq_len": LENGTH}
    batches = evaluation_batches(held_out, **shape)
    batch, apply = batches[0], applied(model)
    output = apply({"params": params}, batch.inputs)
    slow = make_model(dataclasses.replace(model.config, impl="reference"))
    reference = applied(slow)({"params": params}, batch.inputs).logits
    apart = float(jnp.std(output.logits - reference) / jnp.std(reference))
    whole = output.logits.shape == (*batch.inputs.shape, model.config.vocab_size)
    finite = float(jnp.mean(jnp.isfinite(output.logits))) if whole else 0.0
    exact = model.config.dtype == "float32"
    good, fair = ((0, 1e-3), (0, 1e-2)) if exact else ((0, 0.02), (0, 0.1))
    cosine, ratio = frozen(apply, params, batches), gradient_ratio(model, params, batch)
    yield Gate("G0", "difference from the reference, of a logit's spread", apart, good, fair)
    yield Gate("G1", "share of finite logits", finite, (1, 1), (1, 1))
    yield Gate("G3.5", "cosine of memories 64 tokens apart", cosine, (-1, 0.95), (-1, 0.99))
    yield Gate("G4", "gradient norms, RWKV / Mamba", ratio, (0.3, 3), (0.1, 10))
    loss = evaluate(evaluated(model), params, batches)["validation_loss"]
    single, pairs = counted(train, held_out, model.config.vocab_size)
    about = f"held-out loss (pairs {pairs:.3f}, single tokens {single:.3f})"
    yield Gate("naive baseline", about, loss, (0, pairs), (0, single))


def of_untrained(model, train, seed):
    """G2, G3 and overfit."""
    batches = make_batches(train, order="windows", batch_size=ROWS, seq_len=LENGTH, seed=seed)
    steps = [next(batches) for _ in range(STEPS)]
    start, learn = learner(model)
    params = start(jax.random.key(seed)).params
    log_p = jax.nn.log_softmax(applied(model)({"params": params}, steps[0].inputs).logits)
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_p[:, -1]) * log_p[:, -1], axis=-1))
    share = float(entropy) / math.log(model.config.vocab_size)
    yield Gate(
        "G2", "an untrained model's entropy / ln vocabulary", share, (0.9, 1.001), (0.5, 1.001)
    )
    metrics = learn(steps, seed)
    fall = float(metrics["loss"][:10].mean() - metrics["loss"][-10:].mean())
    yield Gate("G3", f"fall of the loss in {STEPS} steps", fall, (0.1, INF), (0, INF))
    norm = float(metrics["grad_norm"].mean())
    yield Gate("G3", "mean gradient norm", norm, (0.5, 1.5), (0, 5))
    last = float(learn(steps[:1] * OVERFIT_STEPS, seed)["loss"][-1])
    yield Gate("overfit", f"loss on a batch seen {OVERFIT_STEPS} times", last, (0, 0.1), (0, 0.5))


def jit(function):
    """jax.jit as the laboratory compiles."""
    return lab.jit(compile_fast=False)(function)


# Programs are made once for a model: all checkpoints given are of one, with other weights.


@functools.cache
def applied(model):
    """Its forward pass."""
    return jit(model.apply)


@functools.cache
def evaluated(model):
    """Its evaluation step."""
    return jit(make_eval_step(model))


@functools.cache
def learner(model):
    """start(key) -> new TrainState, and learn(batches, seed) -> metrics [steps] of the trainer's
    own step over them, from new weights.

    One program takes STEPS of them; the length of the run is an argument of it.
    """
    config = lab.make_config({"optim.lr": RATE})

    def parts(steps):
        schedule = make_schedule(config.optim, steps)
        return make_optimizer(config.optim, schedule), schedule

    start = jit(lambda key: init_state(model, parts(1)[0], config, key))

    @jit
    def advance(state, batches, steps):
        return jax.lax.scan(make_train_step(model, *parts(steps), config), state, batches)

    def learn(batches, seed):
        state, found = start(jax.random.key(seed)), []
        for first in range(0, len(batches), STEPS):
            some = stacked(batches[first : first + STEPS])
            state, metrics = advance(state, some, len(batches))
            found.append(metrics)
        return jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(found))

    return start, learn


def frozen(apply, params, batches):
    """Mean cosine between memories after a row and after another of 64 tokens; None if none."""
    one, other = (batch.inputs for batch in batches[:2])
    before = apply({"params": params}, one).state
    after = apply({"params": params}, other, before).state
    cosines = [
        jnp.mean(optax.losses.cosine_similarity(a.reshape(len(a), -1), b.reshape(len(b), -1)))
        for old, new in zip(before, after)
        for a, b in zip(memories(old).values(), memories(new).values())
    ]
    return float(jnp.mean(jnp.stack(cosines))) if cosines else None


@functools.cache
def gradients(model):
    """(params, batch) -> those of the mean loss."""

    def loss(params, batch):
        logits = model.apply({"params": params}, batch.inputs).logits
        return summed_loss(logits, batch.targets) / jnp.sum(batch.targets >= 0)

    return jit(jax.grad(loss))


def gradient_ratio(model, params, batch):
    """Mean norm of the gradients of RWKV's tensors over that of Mamba's; None without both."""
    norms = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(model)(params, batch)):
        norms.setdefault(optimizer.label(path), []).append(np.linalg.norm(leaf))
    if not {"rwkv", "mamba"} <= set(norms):
        return None
    return float(np.mean(norms["rwkv"]) / np.mean(norms["mamba"]))


def counted(train, held_out, vocab):
    """Held-out nats per token of counted single tokens and of counted pairs.

    p(b) = (n_b + 1) / (n + vocab);  p(b | a) = (n_ab + p(b)) / (n_a + 1), documents apart.
    """
    single = np.ones(vocab)
    pairs = {}
    for ids in train:
        single += np.bincount(ids, minlength=vocab)
        for key, n in zip(*np.unique(_key(ids, vocab), return_counts=True)):
            pairs[key] = pairs.get(key, 0) + n
    single /= single.sum()
    before = np.bincount(np.concatenate([ids[:-1] for ids in train]), minlength=vocab)
    keys = np.concatenate([_key(ids, vocab) for ids in held_out])
    first, second = np.divmod(keys, vocab)
    seen = np.array([pairs.get(key, 0) for key in keys])
    p = (seen + single[second]) / (before[first] + 1)
    return float(-np.log(single[second]).mean()), float(-np.log(p).mean())


def _key(ids, vocab):
    """One number for each pair of neighbours."""
    return np.asarray(ids[:-1], np.int64) * vocab + ids[1:]


def band(gate):
    """Its ranges as text."""
    end = lambda x: "∞" if math.isinf(x) else f"{x:.4g}"
    good, fair = (f"{end(low)} to {end(high)}" for low, high in (gate.good, gate.fair))
    return f"pass {good}" + ("" if gate.good == gate.fair else f", warn {fair}")


if __name__ == "__main__":
    command.run(main)
