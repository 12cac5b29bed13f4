"""Does the original's 8 M model learn subwords as well as GPT-2, when both train for long?

    python -m experiments long_parity --source=PREPARED --seeds=3
    python -m experiments long_parity --source=PREPARED --seeds=3 --steps=5000

GF-MH (width 192, 8 blocks: 8 million parameters without its embedding) and a GPT-2 with at least as
many, embeddings counted. PREPARED is a folder of `python -m gt_jax.prepare`, with a byte-level BPE
of 16,384 ids for example. The original planned 50,000 steps and never took them; of 32 x 128 tokens
they are 205 million. First one seed of each family trains for a tenth of the steps at every rate.
The rate with the lowest loss on the first half of the validation text then trains every seed in
full. Losses are of the second half.
"""

from experiments import lab
from experiments.lab import command, results
from experiments.lab.comparisons import best_rate, difference_table, second_half
from experiments.lab.families import HYBRID, counted_parameters, match
from experiments.lab.statistics import compare, estimate
from gt_jax.training.utilization import flops_per_token

SIZE = (192, 8)  # width and blocks of the hybrid
RATES = (1e-3, 2e-3, 4e-3)
GPT = "GPT-2"
BATCH = {"train.batch_size": 32, "train.seq_len": 128}
COLUMNS = ["model", "shape", "parameters", "in blocks", "rate", "loss", "MFLOPs per token"]
COLUMNS += ["seconds of all seeds"]


def main(argv=None):
    parser = command.parser("long_parity", __doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--steps", type=int, default=50_000, help="training steps")
    options = command.parse(parser, argv)
    shared = BATCH | command.common(options, evaluations=20)
    config = lab.make_config(shared)
    task = lab.text_task(config)
    rates = choose_rates(options, shared, task)
    arms = arms_of(options, shared, task, rates)
    trained = lab.train(arms, seeds=options.seeds, group=options.group, compile_fast=options.quick)
    curves = {name: runs.loss(second_half(runs)) for name, runs in trained.items()}
    losses = {name: curve[:, -1] for name, curve in curves.items()}
    ratio = estimate(losses[HYBRID] / losses[GPT])
    pairs = compare(losses, against=HYBRID)
    measures = {f"loss {name}": estimate(loss) for name, loss in losses.items()}
    measures |= {f"loss ratio {HYBRID} / {GPT}": ratio, f"{GPT} - {HYBRID}": pairs[0]}
    rows = []
    for name, runs in trained.items():
        c = runs.model_config
        flops = flops_per_token(c, config.train.seq_len)
        row = [name, f"{c.dim} x {c.layers}", runs.parameters, counted_parameters(c, "blocks")]
        rows.append([*row, rates[name], measures[f"loss {name}"], flops / 1e6, runs.seconds])
    tokens = config.train.batch_size * config.train.seq_len
    results.write(
        options,
        settings=lab.settings(arms[HYBRID].config)
        | {"rates": RATES, "vocabulary": task.vocab_size},
        measures=measures,
        tables=[
            results.table("Loss", COLUMNS, rows, f"Nats per {task.unit}."),
            difference_table("Difference", pairs),
        ],
        plots=[
            results.plot(
                "Loss",
                "tokens",
                f"nats per {task.unit}",
                [results.line(n, r.steps * tokens, curves[n]) for n, r in trained.items()],
                log="x",
            )
        ],
        notes=[
            "Rates are chosen by one seed in a tenth of the steps, on the first half of the "
            "validation text; losses are of its second half, after the last step.",
            f"{arms[HYBRID].config.train.steps * tokens:,} tokens a run.",
        ],
    )


def arms_of(options, shared, task, rates):
    """name -> Arm of the hybrid, and of a GPT-2 with as many parameters, at rates by name."""
    size = command.size(options, SIZE)
    fit = {"vocab_size": task.vocab_size, "length": lab.make_config(shared).train.seq_len}
    fields = {f: shared | match(f, size, **fit) | {"optim.lr": rates[f]} for f in (HYBRID, GPT)}
    return {family: lab.Arm(lab.make_config(of), task) for family, of in fields.items()}


def choose_rates(options, shared, task):
    """name -> the best rate of one seed in a tenth of the steps."""
    steps = max(lab.make_config(shared).train.steps // 10, 1)
    short = shared | {"train.steps": steps, "train.eval_every": 0}
    runs = lab.train(
        arms_of(options, short, task, dict.fromkeys((HYBRID, GPT), RATES[0])),
        seeds=[0],
        sweep={"optim.lr": RATES},
        group=options.group,
        compile_fast=options.quick,
    )
    return {name: best_rate(of) for name, of in runs.items()}


if __name__ == "__main__":
    command.run(main)
