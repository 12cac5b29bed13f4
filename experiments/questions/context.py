"""How much context does each family use, beyond the 64 tokens that it learnt from?

    python -m experiments context --seeds=3
    python -m experiments context --models=GF-MH,GPT-2 --steps=3000

Families of one size learn from rows of 64 characters, each from an empty state; "GF-MH carried"
begins a row with the state that the row before left. Then they read held-out text, in two ways.

By context: some tokens, spread over the text, are each predicted anew from the last 8, 16, 32, ...
up to 2048 tokens before them. What is predicted stays the same, so nothing but the context can
change the loss. (The published test takes the mean over all positions of a text of c tokens: its
first ones have no context in any model, and longer texts have a smaller share of them.)

    useful context = longest c with perplexity(c') <= 1.5 perplexity(64) for all c' of 64 to c, / 64

By position: rows of 2048 tokens are read with the state carried on to their end, and with the state
reset every 64 tokens: the same predictions, with and without a past. GPT-2 has 64 positions.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import command, programs, results
from experiments.lab.contexts import by_context
from experiments.lab.families import HYBRID, match
from experiments.lab.statistics import estimate, holm
from gt_jax.analysis import memories, norm
from gt_jax.errors import InputError
from gt_jax.models import make_model
from gt_jax.training.text import read_text

CARRIED = f"{HYBRID} carried"
# name -> its family, and what else is different.
MODELS = {name: (name, {}) for name in (HYBRID, "RWKV-6", "Mamba-2", "GPT-2")}
MODELS[CARRIED] = (HYBRID, {"train.carry_state": True, "data.order": "tracks"})
SIZE = (128, 8)  # width and blocks of the hybrid
REACH = 32  # longest context over the length that was learnt
QUICK_REACH = 4
SHORTEST = 8  # of the contexts; each is twice the one before
TARGETS = 1024
TOLERANCE = 1.5  # of perplexities


def main(argv=None):
    parser = command.parser("context", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    options = command.parse(parser, argv)
    names = command.one_of(MODELS, options.models, "--models")
    arms, text = arms_of(options, names)
    trained = next(iter(arms.values())).config.train.seq_len
    longest = trained * (QUICK_REACH if options.quick else REACH)
    if len(text) <= longest + 1:
        raise InputError(
            f"--source={options.source} has {len(text)} validation tokens and {longest + 2} are "
            "needed; name a longer text"
        )
    lengths = [SHORTEST * 2**i for i in range(int(math.log2(longest / SHORTEST)) + 1)]
    places = np.linspace(longest, len(text) - 1, 16 if options.quick else TARGETS).astype(int)
    ends = np.stack([text[place - longest : place + 1] for place in places])
    rows = cut(text, longest)
    runs = lab.train(
        arms,
        seeds=options.seeds,
        group=options.group,
        keep_params=True,
        compile_fast=options.quick,
    )

    def probe(name):
        mine, model = runs[name], make_model(runs[name].model_config)
        known = [c for c in lengths if c <= (model.config.position_limit or c)]
        last = {"rows": ends[:, -max(known) - 1 :], "lengths": known, "window": trained}

        def read(params):
            losses = {"context": by_context(model, params, **last)}
            return losses | by_position(model, params, rows=rows, window=trained)

        read = functools.partial(jax.lax.map, read)  # one seed after the other
        return jax.device_get(lab.jit(options.quick)(read)(mine.params))

    found = dict(zip(names, programs.side_by_side(probe, names)))
    unit = f"nats per {next(iter(arms.values())).task.unit}"
    results.write(
        options,
        settings={
            "steps": int(next(iter(runs.values())).steps[-1]),
            "length": trained,
            "rate": options.lr,
            "targets": len(places),
            "rows": len(rows),
            "contexts": lengths,
        },
        measures=measures_of(found, lengths, trained),
        tables=tables_of(found, runs, lengths, trained, unit),
        plots=plots_of(found, lengths, trained, unit),
        notes=[
            f"All models have one learning rate, {options.lr:g}, so losses of families are not to "
            "be held against each other here: parity does that. Differences within a model are.",
            "Useful contexts end at the longest that was tried. Intervals are over seeds; the "
            "text is one and the same.",
            "Where a state still helps, it may do so by the style of the text or by facts in it: "
            "losses on text do not tell which; needle and recall do.",
        ],
    )


def arms_of(options, names):
    """name -> Arm, and the validation text [n] int32."""
    shared, size = command.common(options, evaluations=1), command.size(options, SIZE)
    config = lab.make_config(shared)
    tokens = read_text(config).tokens
    tasks, arms = {}, {}
    for name in names:
        family, changes = MODELS[name]
        config = lab.make_config(shared | changes)
        if config.data not in tasks:
            tasks[config.data] = lab.text_task(config)
        task = tasks[config.data]
        shape = match(family, size, vocab_size=task.vocab_size, length=config.train.seq_len)
        arms[name] = lab.Arm(lab.make_config(shared | changes | shape), task)
    return arms, np.concatenate(tokens.validation)


def cut(text, length):
    """[rows, length + 1] of a text [n], every target in one row."""
    starts = range(0, len(text) - length, length)
    return np.stack([text[start : start + length + 1] for start in starts])


def by_position(model, params, *, rows, window):
    """Reads rows [B, T + 1] in windows.

    Returns:
        A dict: carried and reset [T] float32 nats, means over rows; NaN where a model has no
        positions; norms, part -> [T / window, layers] of the memories after each window.
    """
    split = lambda x: x.reshape(len(x), -1, window).swapaxes(0, 1)  # [windows, B, window]
    windows = split(rows[:, :-1]), split(rows[:, 1:])
    empty = model.init_state(len(rows))

    def read(state, pair):
        inputs, targets = pair
        logits, state = model.apply({"params": params}, inputs, state)
        kept = [memories(block) for block in state]
        norms = {part: jnp.stack([norm(m[part]).mean() for m in kept]) for part in kept[0]}
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return state, (losses.mean(0), norms)

    _, (carried, norms) = jax.lax.scan(read, empty, windows)
    reset = jax.lax.map(lambda pair: read(empty, pair)[1][0], windows)
    return {"carried": carried.ravel(), "reset": reset.ravel(), "norms": norms}


def octaves(curve, lengths):
    """[seeds, T] -> [seeds, lengths]: means over positions c / 2 to c, for the first c 0 to c."""
    starts = [0, *lengths[:-1]]
    return np.stack([curve[:, a:b].mean(1) for a, b in zip(starts, lengths)], axis=1)


def useful(losses, lengths, trained):
    """[seeds] useful context, from losses [seeds, lengths], as the module says."""
    start = lengths.index(trained)
    within = losses[:, start:] - losses[:, [start]] <= math.log(TOLERANCE)
    run = np.cumprod(within, axis=1).sum(axis=1)  # lengths before the first that is not
    return np.array([lengths[start + n - 1] / trained for n in run])


def helps_to(losses, lengths):
    """The longest context up to which every doubling lowers the loss, by Holm-corrected tests."""
    steps = holm([{"values": (b - a).tolist()} for a, b in zip(losses.T, losses.T[1:])])
    longest = lengths[0]
    for length, step in zip(lengths[1:], steps):
        if not (step["real"] and step["mean"] < 0):
            break
        longest = length
    return longest


def published_gain(reset, trained):
    """[seeds] of the published test: perplexity of texts of 64 tokens against that of 8."""
    by_place = reset.reshape(len(reset), -1, trained).mean(1)  # [seeds, window]
    return 1 - np.exp(by_place[:, : trained - 1].mean(1) - by_place[:, : SHORTEST - 1].mean(1))


def measures_of(found, lengths, trained):
    """name -> estimate; those of the hybrid also by the names that claims use."""
    measures = {}
    for name, f in found.items():
        losses = f["context"]
        own = lengths[: losses.shape[1]]
        at = dict(zip(own, losses.T))
        gain = 1 - np.exp(at[trained] - at[SHORTEST])
        measures[f"useful context {name}"] = estimate(useful(losses, own, trained))
        measures[f"context helps to {name}"] = helps_to(losses, own)
        measures[f"perplexity gain {SHORTEST} to {trained} {name}"] = estimate(gain)
        published = estimate(published_gain(f["reset"], trained))
        measures[f"perplexity gain {SHORTEST} to {trained}, as published {name}"] = published
        for length in own[own.index(trained) + 1 :]:
            ratio = np.exp(at[length] - at[trained])
            measures[f"perplexity ratio {length} / {trained} {name}"] = estimate(ratio)
        for part, norms in f["norms"].items():
            grown = (norms[:, -1] / norms[:, 0]).mean(-1)
            measures[f"state growth {part} {name}"] = estimate(grown)
    ours = {key.removesuffix(f" {HYBRID}"): m for key, m in measures.items() if "state" not in key}
    return measures | {key: m for key, m in ours.items() if key not in measures}


def tables_of(found, runs, lengths, trained, unit):
    """What every context is worth, how far it reaches, and what carrying a state does."""
    contexts, reaches, positions = [], [], []
    measures = measures_of(found, lengths, trained)
    for name, f in found.items():
        losses = f["context"]
        own = lengths[: losses.shape[1]]
        cells = [estimate(column) for column in losses.T]
        contexts.append([name, runs[name].parameters, *cells, *[None] * (len(lengths) - len(own))])
        gain = f"perplexity gain {SHORTEST} to {trained}"
        reaches.append(
            [
                name,
                measures[f"useful context {name}"],
                measures[f"context helps to {name}"],
                measures[f"{gain} {name}"],
                measures[f"{gain}, as published {name}"],
                *(measures.get(f"state growth {part} {name}") for part in ("rwkv", "mamba")),
            ]
        )
        for how in ("carried", "reset"):
            cells = [estimate(column) for column in octaves(f[how], lengths).T]
            positions.append([name, how, *cells])
    gain = f"{SHORTEST} to {trained}"
    columns = ["model", "useful context", "context helps to", f"gain {gain}", "gain, as published"]
    columns += ["RWKV state growth", "Mamba state growth"]
    spans = [f"{a} to {b}" for a, b in zip([0, *lengths], lengths)]
    return [
        results.table(
            f"Loss by context, {unit}",
            ["model", "parameters", *(f"{c:,}" for c in lengths)],
            contexts,
            "The same tokens in all columns, each from as many tokens before it.",
        ),
        results.table(
            "Reach of the context",
            columns,
            reaches,
            f"Useful context in lengths of {trained}, at most {lengths[-1] // trained}. A context "
            "helps if doubling it lowers the loss by a corrected test. Gains are shares of "
            f"perplexity. Growth is the norm at {lengths[-1]:,} tokens over that at {trained}.",
        ),
        results.table(
            f"Loss by position, {unit}",
            ["model", "state", *spans],
            positions,
            "Columns are of different tokens; the two rows of a model are of the same.",
        ),
    ]


def plots_of(found, lengths, trained, unit):
    """Loss against context, carried against reset, norms against position."""
    context, gain, norms = [], [], []
    for name, f in found.items():
        context.append(results.line(name, lengths[: f["context"].shape[1]], f["context"]))
        if np.isfinite(f["carried"]).all():
            curve = octaves(f["carried"] - f["reset"], lengths)
            gain.append(results.line(name, lengths, curve))
        for part, curve in f["norms"].items():
            places = trained * np.arange(1, curve.shape[1] + 1)
            norms.append(results.line(f"{name}, {part}", places, curve.mean(-1)))
    return [
        results.plot("Loss by context, the same tokens", "context", unit, context, log="x"),
        results.plot("State carried against reset", "position", f"{unit} added", gain, log="x"),
        results.plot("Norm of the state", "position", "mean over blocks", norms, log="xy"),
    ]


if __name__ == "__main__":
    command.run(main)
