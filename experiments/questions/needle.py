"""Over what distance does each family find a needle in a haystack?

    python -m experiments needle --seeds=3
    python -m experiments needle --texts=characters --steps=4000

The haystack is text, the needles are a key and a value each, four in a row, and keys come again at
its end: what was the value? (tasks.needle.) Families of one size learn on rows of 256 tokens, where
needles come again in the midst of the text too, at both learning rates of a sweep, and take the
better one, by half of the tests of that length, which ask at the end only. They are then asked for
one needle in texts of up to 16 384 tokens, at five depths; GPT-2 only as far as it has positions. A
value is right if each of its tokens is the likeliest. Haystacks of tests come from the validation
text.
"""

import functools
import itertools

import jax
import numpy as np

from experiments import lab
from experiments.lab import command, programs, results, tasks
from experiments.lab.comparisons import at_best_rate
from experiments.lab.families import FAMILIES, HYBRID, TEXTS, match
from experiments.lab.statistics import estimate
from experiments.lab.training import TEST_BATCHES
from gt_jax.models import make_model
from gt_jax.training.text import read_text

SIZE = (128, 4)  # width and blocks of the hybrid
RATES = (1e-3, 3e-3)
LENGTHS = (256, 1024, 4096, 16384)  # the first is learnt
QUICK_LENGTHS = (64, 96)
REPEATS = 16  # tokens of a row to learn from to each time that a needle comes again
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS = 32  # in a training batch
TRIALS = 16  # texts of every length and depth, the same for all models


def main(argv=None):
    parser = command.parser("needle", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--texts", default=",".join(TEXTS), help="texts, with commas between")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    options = command.parse(parser, argv)
    texts = command.one_of(TEXTS, options.texts, "--texts")
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    shared = {"train.batch_size": ROWS} | command.common(options, evaluations=10)
    shared["train.seq_len"] = lengths[0]
    arms, tests = {}, {}
    for text in texts:
        changes = shared | TEXTS[text] | ({"data.vocab_size": 300} if options.quick else {})
        task, tests[text] = needle_task(lab.make_config(changes), text)
        size = command.size(options, SIZE)
        for family in FAMILIES:
            shape = match(family, size, vocab_size=task.vocab_size, length=lengths[0])
            arms[text, family] = lab.Arm(lab.make_config(changes | shape), task)
    trained = lab.train(
        {" ".join(key): arm for key, arm in arms.items()},
        seeds=options.seeds,
        sweep={"optim.lr": RATES},
        group=options.group,
        keep_params=True,
        compile_fast=options.quick,
    )
    runs = {key: at_best_rate(trained[" ".join(key)]) for key in arms}

    def ask(job):
        (text, family), length = job
        limit = runs[text, family].model_config.max_positions
        if family == "GPT-2" and length > limit:
            return None
        return found(runs[text, family], tests[text], length, quick=options.quick)

    jobs = list(itertools.product(arms, lengths))
    right = dict(zip(jobs, programs.side_by_side(ask, jobs)))  # [seeds, depths]
    line = functools.partial(results.line, within=results.SHARE)
    measures, tables, plots = {}, [], []
    for text in texts:
        rows, lines = [], []
        for family in FAMILIES:
            mine = {length: right[(text, family), length] for length in lengths}
            means = {n: estimate(x.mean(-1)) for n, x in mine.items() if x is not None}
            measures |= {f"needle {family}, {text}, {n}": found for n, found in means.items()}
            rate = runs[text, family].points[0]["optim.lr"]
            rows.append([family, runs[text, family].parameters, rate, *map(means.get, lengths)])
            lines.append(line(family, list(means), np.stack([mine[n].mean(-1) for n in means], 1)))
        columns = ["model", "parameters", "rate", *(f"{n:,} tokens" for n in lengths)]
        tables.append(results.table(f"Needles found, {text}", columns, rows, NOTE))
        plots.append(results.plot(f"Needles, {text}", "tokens", "found", lines, log="x"))
        longest = [
            line(family, DEPTHS, right[(text, family), n])
            for family in FAMILIES
            for n in [max(n for n in lengths if right[(text, family), n] is not None)]
        ]
        plots.append(results.plot(f"At the longest, {text}", "depth", "found", longest))
    if "characters" in texts:
        known = measures[f"needle {HYBRID}, characters, {lengths[0]}"]
        measures[f"needle accuracy {HYBRID}"] = known
    config = next(iter(arms.values())).config
    results.write(
        options,
        settings=lab.settings(config)
        | {"lengths": lengths, "depths": DEPTHS, "trials": TRIALS, "rates": RATES},
        measures=measures,
        tables=tables,
        plots=plots,
        notes=[
            "The longest text of GPT-2 is the one it learnt on: it has no further positions.",
            f"Who does not find them in {lengths[0]} tokens has not learnt to in these steps, "
            "which says nothing of distances.",
        ],
    )


NOTE = "Mean over depths, and half its 95 % interval over seeds; the first length is that learnt."


def needle_task(config, name):
    """The lab.Task, and a function of a depth that gives the generator of its tests."""
    tokenizer, tokens = read_text(config)[1:]
    make = functools.partial(tasks.needle, vocab_size=tokenizer.vocab_size + 1)
    unread = functools.partial(make, haystack=np.concatenate(tokens.validation))
    task = lab.drawn_task(
        name,
        functools.partial(
            make, haystack=np.concatenate(tokens.train), repeats=config.train.seq_len // REPEATS
        ),
        tokenizer.vocab_size + 1,
        config.train.seq_len,
        config.train.batch_size,
        tests=[unread] * TEST_BATCHES,
    )
    return task, lambda depth: functools.partial(unread, questions=1, depth=depth)


def found(runs, test, length, *, quick):
    """[seeds, depths] share of the texts of a length whose needle's value is right.

    Args:
        runs: with parameters.
        test: depth -> generator.
        length: tokens.
        quick: compile fast.
    """
    model = make_model(runs.model_config)
    drawn = [
        test(depth)(np.random.default_rng([length, i]), TRIALS, length)
        for i, depth in enumerate(DEPTHS)
    ]
    tokens, targets = (np.stack(part) for part in zip(*drawn))  # [depths, TRIALS, length]

    def of_text(params, text):
        row, wanted = text
        guesses = model.apply({"params": params}, row[None]).logits[0, -tasks.VALUE :].argmax(-1)
        return (guesses == wanted[-tasks.VALUE :]).all()

    def of_run(params):
        rows = (tokens.reshape(-1, length), targets.reshape(-1, length))
        right = jax.lax.map(functools.partial(of_text, params), rows)
        return right.reshape(len(DEPTHS), TRIALS).mean(-1)

    run = lambda params: jax.lax.map(of_run, params)
    return np.asarray(lab.jit(quick)(run)(runs.params))


if __name__ == "__main__":
    command.run(main)
