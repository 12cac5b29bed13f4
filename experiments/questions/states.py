"""What do the states of a trained hybrid hold, for how long, and whose are they?

    python -m experiments states --seeds=3

GF-MH of width 128 and 8 blocks reads held-out text, before and after training. Its states are the
memories that it returns itself: RWKV's and Mamba's sums over the past, in every block. With them
are made the published tests S1 to S4 (S0 asks for their shapes, which the settings say), D1 to D4
and of state evolution, and besides:

Mutual information. K texts leave K states; a text is continued from each of them in turn, with one
branch's memories swapped and all else its own. With y the token after t tokens of that text, and S
drawn from the K states,  I(S; y) = H(mean_s p(y | s)) - mean_s H(p(y | s))  nats, at most log K.
How it falls with t says how long a branch's memory matters to what is written.

Gradient coupling. Correlation over steps of the changes of the logarithms of both gradient norms.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import command, formats, results
from experiments.lab.families import HYBRID
from experiments.lab.statistics import estimate
from gt_jax.analysis import memories
from gt_jax.models import make_model
from gt_jax.training.model import make_model_config
from gt_jax.training.text import read_text

BRANCHES = {"rwkv": "RWKV", "mamba": "Mamba"}
TEXTS, WINDOWS = 10, 8  # rows that are read, and their length in training lengths
# test -> where a number passes, and where it does but warn, as published; evolution is 59.
BANDS = {
    "S1 norm": ((1e-3, 1e3), (1e-3, 1e3)),
    "S2 difference for another text": ((0.01, math.inf), (0.01, math.inf)),
    "S3 difference for the same text": ((-1, 1e-5), (-1, 1e-5)),
    "S4 variance, RWKV / Mamba": ((0.1, 10), (0.01, 100)),
    "D1 norm, last chunk / first": ((0, 2), (0, 10)),
    "D2 variance over texts": ((1e-6, math.inf), (1e-6, math.inf)),
    "D3 share of the smaller norm": ((0.01, 1), (0.001, 1)),
    "D4 influence of the first token": ((0.01, math.inf), (0.001, math.inf)),
    "evolution, text / one token": ((1, math.inf), (1, math.inf)),
}
SWAPPED = 32  # texts whose memories are swapped
# which memories -> whether those of RWKV and of Mamba are
SWAPS = {"RWKV": (True, False), "Mamba": (False, True), "both": (True, True)}


def main(argv=None):
    parser = command.parser("states", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    options = command.parse(parser, argv)
    config = lab.make_config(command.common(options, evaluations=1))
    task = lab.text_task(config)
    runs = lab.train(
        {HYBRID: lab.Arm(config, task)},
        seeds=options.seeds,
        group=options.group,
        keep_params=True,
        compile_fast=options.quick,
    )[HYBRID]
    found = look(config, task, runs, options)
    kept = memories(make_model(runs.model_config).init_state(1)[0])
    measures = measures_of(found) | {"gradient coupling": estimate(coupling(runs.metrics))}
    results.write(
        options,
        settings={
            "steps": config.train.steps,
            "length": config.train.seq_len,
            "rate": options.lr,
            "memories of a block": {name: kept[b].shape[1:] for b, name in BRANCHES.items()},
        },
        measures=measures,
        tables=[tests_table(found), information_table(found["trained"]["information"])],
        plots=plots_of(found, config.train.seq_len),
        notes=[
            "Norms and variances of memories of different shapes do not say what the model does "
            "with them; mutual information does.",
            "A swapped memory is one that the model would not have beside the other's: its "
            "predictions are those of an intervention. What they do not show may be in it still.",
            f"Gradient coupling: {formats.show(measures['gradient coupling'])}, over the last nine "
            "tenths of the steps.",
        ],
    )


def look(config, task, runs, options):
    """{"untrained", "trained"}: what `diagnose` says, and "information", all [seeds, ...]."""
    text = np.concatenate(read_text(config).tokens.validation)
    model = make_model(make_model_config(config, task.vocab_size))
    window = config.train.seq_len
    rows = with_changes(texts_of(text, TEXTS, WINDOWS * window))
    mixed = texts_of(text, 4 if options.quick else SWAPPED, (WINDOWS + 1) * window)
    jit = lab.jit(options.quick)
    read_all = jit(functools.partial(read, model, rows=rows, window=window))
    swap_all = jit(functools.partial(information, model, rows=mixed, after=WINDOWS * window))
    init = jit(lambda key: model.init(jax.random.fold_in(key, 0), rows[:1, :window])["params"])
    found = {"untrained": [], "trained": []}
    for i, seed in enumerate(options.seeds):
        params = {
            "untrained": init(jax.random.key(seed)),
            "trained": jax.tree.map(lambda x, i=i: x[i], runs.params),
        }
        for when, each in params.items():
            one = diagnose(*jax.device_get(read_all(each)), TEXTS)
            found[when].append(one | {"information": jax.device_get(swap_all(each))})
    return {when: jax.tree.map(lambda *x: np.stack(x), *each) for when, each in found.items()}


def texts_of(text, count, length):
    """[count, length] spread over a text [n], which goes round and round if it is short."""
    starts = np.linspace(0, max(len(text) - length, count), count).astype(int)
    return np.take(text, starts[:, None] + np.arange(length), mode="wrap")


def with_changes(rows):
    """Rows [R, T], the same ones with another first token, the first again, and a a a a ... ."""
    changed = rows.copy()
    changed[:, 0] = np.where(rows[:, 0] == rows[:, 1], rows.max(), rows[:, 1])
    return np.concatenate([rows, changed, rows[:1], np.full_like(rows[:1], rows[0, 0])])


def read(model, params, *, rows, window):
    """Reads rows [B, T] in windows.

    Returns:
        logits [T / window, B, vocab] at the end of each, and branch -> [T / window, layers, B, n],
        the memories then.
    """
    windows = rows.reshape(len(rows), -1, window).swapaxes(0, 1)

    def step(state, tokens):
        logits, state = model.apply({"params": params}, tokens, state)
        kept = [memories(block) for block in state]
        flat = {b: jnp.stack([k[b].reshape(len(rows), -1) for k in kept]) for b in BRANCHES}
        return state, (logits[:, -1], flat)

    return jax.lax.scan(step, model.init_state(len(rows)), windows)[1]


def diagnose(logits, states, count):
    """The numbers of the tests, from what `read` says of `with_changes` of `count` texts.

    Returns:
        test -> float, or {branch: float}, means over blocks (of S1 the mean over all, of S3 the
        largest); norm, {branch: [windows]}; cosine, {branch: float} of the states before and after
        the last window; and share, RWKV's in the norms.
    """
    tests = {name: {} for name in (*BANDS, "norm", "cosine")}
    variance = {}
    for branch, memory in states.items():
        texts, _, again, alike = np.split(memory, [count, 2 * count, 2 * count + 1], axis=2)
        norm = np.linalg.norm(texts, axis=-1)  # [windows, layers, texts]
        end = texts[-1]  # [layers, texts, n]
        apart = np.linalg.norm(end - np.roll(end, 1, axis=1), axis=-1) / norm[-1]
        variance[branch] = end.var(-1).mean()
        numbers = {
            "S1 norm": norm[-1].mean(),
            "S2 difference for another text": apart.mean(),
            "S3 difference for the same text": np.abs(again[-1, :, 0] - end[:, 0]).max(),
            "D1 norm, last chunk / first": (norm[-1] / norm[0]).mean(),
            "D2 variance over texts": texts[1].var(1).mean(),
            "evolution, text / one token": texts[0].var(-1).mean() / alike[0].var(-1).mean(),
            "norm": norm.mean((1, 2)),
            "cosine": (np.sum(end * texts[-2], -1) / (norm[-1] * norm[-2])).mean(),
        }
        for name, number in numbers.items():
            tests[name][branch] = number
    last = {b: np.linalg.norm(m[-1, :, :count], axis=-1) for b, m in states.items()}
    share = (last["rwkv"] / (last["rwkv"] + last["mamba"])).mean()
    half = logits[len(logits) // 2 - 1]
    change = np.linalg.norm(half[count : 2 * count] - half[:count], axis=-1)
    tests["S4 variance, RWKV / Mamba"] = variance["rwkv"] / variance["mamba"]
    tests["D3 share of the smaller norm"] = min(share, 1 - share)
    influence = change / np.linalg.norm(half[:count], axis=-1)
    return tests | {"D4 influence of the first token": influence.mean(), "share": share}


def information(model, params, *, rows, after):
    """Mutual information of swapped memories and what is written.

    Args:
        rows: [K, T] texts; memories are those after `after` tokens, and then the rest is read.

    Returns:
        A key of SWAPS -> [T - after] float32 nats, means over texts.
    """
    K = len(rows)
    states = model.apply({"params": params}, rows[:, :after]).state
    rest = jnp.asarray(rows[:, after:])

    def entropy(log_p):
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def of_text(which, i):
        own = jax.tree.map(lambda x: jnp.broadcast_to(x[i], x.shape), states)
        given = jnp.broadcast_to(rest[i], rest.shape)
        logits = model.apply({"params": params}, given, swapped(own, states, which)).logits
        log_p = jax.nn.log_softmax(logits)  # [K, T - after, vocab]
        mixture = jax.nn.logsumexp(log_p, axis=0) - math.log(K)
        return entropy(mixture) - entropy(log_p).mean(0)

    def of_swap(which):
        return jax.lax.map(functools.partial(of_text, which), jnp.arange(K)).mean(0)

    return dict(zip(SWAPS, jax.lax.map(of_swap, jnp.array(list(SWAPS.values())))))


def swapped(own, other, which):
    """A hybrid's state `own` with the memories of `other` where `which` [2] is true."""

    def block(a, b):
        wkv = jnp.where(which[0], b.rwkv.wkv, a.rwkv.wkv)
        ssm = jnp.where(which[1], b.mamba.ssm, a.mamba.ssm)
        return a._replace(rwkv=a.rwkv._replace(wkv=wkv), mamba=a.mamba._replace(ssm=ssm))

    return tuple(map(block, own, other))


def coupling(metrics):
    """[runs] correlation of the changes of the logarithms of the branches' gradient norms."""
    skip = metrics["loss"].shape[1] // 10
    changes = [np.diff(np.log(metrics[f"grad_norm_{b}"][:, skip:]), axis=1) for b in BRANCHES]
    return [np.corrcoef(*pair)[0, 1] for pair in zip(*changes)]


def verdict(name, values):
    """ "pass", "warn" or "fail" of a test, by the worst of its values over seeds."""
    for word, (low, high) in zip(("pass", "warn"), BANDS[name]):
        if all(low < value < high for value in values):
            return word
    return "fail"


def tests_of(found):
    """(test, branch or "") -> [seeds]."""
    values = {}
    for name in (*BANDS, "cosine"):
        parts = found[name] if isinstance(found[name], dict) else {"": found[name]}
        values |= {(name, BRANCHES.get(part, "")): value for part, value in parts.items()}
    return values


def measures_of(found):
    """name -> estimate, by the names that claims use; of trained models if not said otherwise."""
    measures = {}
    for when, f in found.items():
        suffix = "" if when == "trained" else f", {when}"
        measures[f"RWKV share of state norms{suffix}"] = estimate(f["share"])
        for (name, branch), values in tests_of(f).items():
            measures[f"{name} {branch}".strip() + suffix] = estimate(values)
        for name, nats in f["information"].items():
            measures[f"information {name}, next token{suffix}"] = estimate(nats[:, 0])
            measures[f"information {name}, mean{suffix}"] = estimate(nats.mean(1))
    return measures


def tests_table(found):
    """Every test before and after training."""
    rows = [
        [
            name,
            branch,
            estimate(before),
            estimate(after),
            verdict(name, after) if name in BANDS else None,
        ]
        for (name, branch), before in tests_of(found["untrained"]).items()
        for after in [tests_of(found["trained"])[name, branch]]
    ]
    return results.table(
        "State tests",
        ["test", "branch", "untrained", "trained", "published band"],
        rows,
        "Means over blocks and texts; differences of texts are over the norm. The bands are those "
        "published, for numbers of another kind: a pass says no more than that.",
    )


def information_table(information):
    """What swapped memories tell of the token after some tokens."""
    length = information["both"].shape[1]
    after = [2**i for i in range(int(math.log2(length)) + 1)]
    rows = [
        [name, *(estimate(nats[:, n - 1]) for n in after), estimate(nats.mean(1))]
        for name, nats in information.items()
    ]
    return results.table(
        "Mutual information of memories and the next token, nats",
        ["swapped", *(f"after {n}" for n in after), "mean"],
        rows,
        "After training. Tokens read since the memories were swapped.",
    )


def plots_of(found, window):
    """Norms of states, and information."""
    norms = [
        results.line(f"{BRANCHES[b]}, {when}", window * np.arange(1, norm.shape[1] + 1), norm)
        for when, f in found.items()
        for b, norm in f["norm"].items()
    ]
    told = [
        results.line(name, range(1, nats.shape[1] + 1), nats)
        for name, nats in found["trained"]["information"].items()
    ]
    return [
        results.plot("Norm of the state", "tokens", "mean over blocks", norms, log="xy"),
        results.plot("Information on the next token", "tokens since", "nats", told, log="x"),
    ]


if __name__ == "__main__":
    command.run(main)
