"""How many pairs can each family recall, and with how large a state?

    python -m experiments.recall --seeds=3
    python -m experiments.recall --models=GPT-2 --steps=12000 --out=results/recall-gpt2.json

Multi-query associative recall as in Zoology (Arora et al. 2023, arXiv:2312.04927): two blocks, a
vocabulary of 8192, four learning rates, of which every model takes its best, chosen on half of the
test sequences; the other half is reported. Models learn from a mixture of 4 to 64 pairs in 256
tokens, as in the sequel (arXiv:2402.18668), and are tested on every number apart. Recurrent models
have a state of one of two sizes, the same for all families: the hybrid's branches share it.

This checks the instrument, too: GPT-2 should have all answers right, and models with a small state
fewer of them with more pairs.
"""

import functools

import numpy as np

from experiments import lab, results, tasks
from experiments.parity import FAMILIES, HYBRID
from experiments.statistics import estimate
from experiments.toys import at_best_rate, make_task

PAIRS = (4, 8, 16, 32, 64)
QUICK_PAIRS = (1, 2)  # what sequences of 16 tokens have room for
VOCABULARY = 8192
RATES = (1e-4, 4.6e-4, 2.2e-3, 1e-2)
STATES = {"small": 16, "large": 64}  # numbers in a block's state for each channel of the model
SHAPE = {"model.dim": 64, "model.layers": 2, "train.batch_size": 64, "train.seq_len": 256}
COPIES = 8  # test batches for every number of pairs


def main(argv=None):
    parser = results.parser("recall", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--models", help="with commas between; all if not given")
    parser.add_argument("--steps", type=int, default=2000)
    options = results.parse(parser, argv)
    shared = SHAPE | {"train.steps": options.steps, "train.eval_every": max(options.steps // 5, 1)}
    shared |= results.common(options)
    config = lab.make_config(shared)
    models = models_of(config.model.dim, config.train.seq_len)
    names = results.one_of(models, options.models or ",".join(models), "--models")
    numbers = QUICK_PAIRS if options.quick else PAIRS
    makers = [functools.partial(tasks.recall, pairs=n, vocab_size=VOCABULARY) for n in numbers]
    task = make_task(
        "recall",
        functools.partial(mixture, makers),
        VOCABULARY,
        config.train.seq_len,
        config.train.batch_size,
        tests=makers * COPIES,
    )
    runs = lab.train(
        {name: lab.Arm(lab.make_config(shared | models[name]), task) for name in names},
        seeds=options.seeds,
        sweep={"optim.lr": RATES},
        group=options.group,
        compile_fast=options.quick,
    )

    measures, rows, lines, means = {}, [], [], {}
    for name in names:
        r = at_best_rate(runs[name])
        right = by_pairs(r, len(numbers))
        found = {f"recall {name}, {n} pairs": estimate(x) for n, x in zip(numbers, right.T)}
        rate = measures[f"best rate {name}"] = r.points[0]["optim.lr"]
        measures |= found
        rows.append([name, r.parameters, state_numbers(r.model_config), *found.values(), rate])
        lines.append(results.line(name, numbers, right))
        means[name] = right.mean(0)
    columns = ["model", "parameters", "numbers in a block's state"]
    columns += [*(f"{n} pairs" for n in numbers), "best rate"]
    results.write(
        options,
        settings=lab.settings(config)
        | {
            "vocabulary": VOCABULARY,
            "rates": RATES,
        },
        measures=measures | {"check of the instrument": check(means)},
        tables=[
            results.table(
                "Share of values recalled",
                columns,
                rows,
                "Mean and half its 95 % interval over seeds; GPT-2 keeps every token.",
            )
        ],
        plots=[results.plot("Recall", "pairs", "share of values recalled", lines, log="x")],
        notes=[
            f"Check of the instrument: {check(means)}. It is passed if GPT-2 has more than 99 % "
            "right at every number of pairs, and every model with a small state less at most pairs "
            "than at fewest.",
            f"The published runs saw 6.4 million sequences for each number of pairs; these see "
            f"{config.train.steps * config.train.batch_size:,} of all numbers together.",
        ],
    )


def models_of(width, length):
    """name -> config changes: GPT-2, and every recurrent family with a state of each size.

    A block of RWKV-6 keeps a head's width of numbers for every channel, one of Mamba-2 twice its
    state size; a branch of the hybrid half of what its block may.
    """
    shared = {"model.dim": width}
    gpt = {"model.heads": 1, "model.max_positions": length}
    models = {"GPT-2": FAMILIES["GPT-2"] | shared | gpt}
    for size, kept in STATES.items():
        shapes = {
            "RWKV-6": {"model.heads": max(width // kept, 1)},
            "Mamba-2": {"model.state_size": kept // 2},
            HYBRID: {"model.heads": max(2 * width // kept, 1), "model.state_size": kept // 4},
        }
        models |= {f"{f} {size}": FAMILIES[f] | shared | shape for f, shape in shapes.items()}
    return models


def state_numbers(model_config):
    """Numbers in the recurrent state of a block; None for attention."""
    c = model_config
    rwkv = c.dim * c.head_dim if c.architecture in ("hybrid", "rwkv6") else 0
    mamba = c.mamba_dim * c.state_size if c.architecture in ("hybrid", "mamba2") else 0
    return rwkv + mamba or None


def mixture(makers, rng, batch, length):
    """A generator of experiments.tasks: about as many rows of each maker, in random order."""
    kinds = np.bincount(np.arange(batch) % len(makers), minlength=len(makers))
    made = [make(rng, rows, length) for make, rows in zip(makers, kinds) if rows]
    order = rng.permutation(batch)
    tokens, targets = (np.concatenate(part)[order] for part in zip(*made))
    return tokens, targets


def by_pairs(runs, count):
    """[runs, count] last accuracy at each number of pairs, on the second half of the tests."""
    half = len(runs.targets) // 2
    right = [runs.accuracy(slice(half + i, None, count))[:, -1] for i in range(count)]
    return np.stack(right, axis=1)


def check(means):
    """ "passed", "failed" or "not made", from name -> mean recall at rising numbers of pairs."""
    small = [mean for name, mean in means.items() if name.endswith("small")]
    if "GPT-2" not in means or not small:
        return "not made"
    solved = min(means["GPT-2"]) > 0.99
    return "passed" if solved and all(m[-1] < m[0] for m in small) else "failed"


if __name__ == "__main__":
    results.run(main)
