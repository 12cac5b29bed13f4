"""Tables of the benchmark of several GPUs: what was measured, compared with one card."""

import statistics

from experiments.lab import results
from experiments.lab.recurrences import OPS

# Speedups to reach, by what cards share: rows of a batch or tokens of a row.
WANTED = {"rows": {2: 1.9, 4: 3.6}, "tokens": {2: 1.7, 4: 2.9}}
MODES = ("one card", "data", "fsdp", "one card, long", "sequence")  # and "reference"
TRAINING_COLUMNS = ["config", "mode", "cards", "rows x length", "ms a step", "tokens/s", "speedup"]
TRAINING_COLUMNS += ["peak MiB a card", "state MiB a card", "collectives", "exposed"]
TRAINING_COLUMNS += ["loss difference", "same bits", "compile s"]
RECURRENCE_COLUMNS = ["recurrence", "cards", "length", "ms", "speedup", "MiB a card", "difference"]
SPEEDUP_COLUMNS = ["of", "mode", "cards", "speedup", "wanted", "state, of one card's"]


def write(options, jobs, found, shown=True):
    """The result of what `workers.run_all` found, as a file and, if it is to be shown, printed."""
    rows = found.get("recurrences", [])
    if isinstance(rows, dict):  # the reason why there are none
        rows = [[op, n, rows["reason"]] + [None] * 4 for op in OPS for n in (1, *options.cards)]
    trained = compare(jobs, found)
    measures = {
        f"{job.name} {name}": row[name]
        for job, row in trained
        for name in ("tokens/s", "speedup", "collectives", "exposed", "state bytes")
        if row.get(name) is not None
    }
    measures |= {
        f"{op} on {cards} speedup": speedup
        for op, cards, *_, speedup, _, _ in rows
        if speedup is not None and cards > 1
    }
    results.write(
        options,
        settings={"cards": options.cards, "rows": options.rows, "length": options.length}
        | {"stretches": len(options.seeds), "steps of a stretch": options.timed_steps},
        measures=measures,
        tables=[
            results.table(
                "Collectives",
                ["config", "mode", "cards", "kernel", "ms a step"],
                [
                    [job.config, job.mode, job.cards, kernel, ms]
                    for job, row in trained
                    for kernel, ms in row.get("kernels", {}).items()
                ],
            ),
            results.table("Recurrences, forward and backward", RECURRENCE_COLUMNS, rows),
            results.table("Training", TRAINING_COLUMNS, [cells(job, row) for job, row in trained]),
            results.table("Speedups", SPEEDUP_COLUMNS, speedups(rows, trained)),
        ],
        notes=["A time is the median of the stretches; ± is half their range."],
        shown=shown,
    )


def compare(jobs, found):
    """[(job, numbers)] but references, in order, with comparisons to one card's."""
    rows = []
    shown = [job for job in jobs if job.mode != "reference"]
    for job in sorted(shown, key=lambda job: (job.config, MODES.index(job.mode), job.cards)):
        row = dict(found[job.name])
        long = job.mode in MODES[3:]
        one = found.get(f"{job.config} {MODES[3] if long else MODES[0]}", {})
        if "tokens/s" in row and "tokens/s" in one:
            speeds = [statistics.median(r["tokens/s"]["values"]) for r in (row, one)]
            row["speedup"] = speeds[0] / speeds[1]
            row["of one's state"] = row["state bytes"] / one["state bytes"]
        known = one.get("losses")
        if not long:
            known = found.get(f"{job.config} reference", {}).get("losses", {}).get(job.cards)
        if job.cards > 1 and "losses" in row and known:
            row["loss difference"] = max(abs(a / b - 1) for a, b in zip(row["losses"], known))
        rows.append((job, row))
    return rows


def cells(job, row):
    """A row of the table of training."""
    shape = f"{job.changes['train.batch_size']} x {job.changes['train.seq_len']}"
    first = [job.config, job.mode, job.cards, shape]
    if "reason" in row:
        return [*first, row["reason"]] + [None] * (len(TRAINING_COLUMNS) - len(first) - 1)
    mib = lambda name: row[name] and row[name] / 2**20
    numbers = [row["ms"], row["tokens/s"], row.get("speedup"), mib("peak"), mib("state bytes")]
    numbers += [row.get(name) for name in ("collectives", "exposed", "loss difference")]
    return [*first, *numbers, row["same bits"], row["compile s"]]


def speedups(rows, trained):
    """Rows of the table of speedups: of recurrences and of training."""
    found = [
        [op, "sequence", n, speedup, WANTED["tokens"].get(n), None]
        for op, n, *_, speedup, _, _ in rows
        if n > 1
    ]
    for job, row in trained:
        if job.cards > 1:
            shared = "tokens" if job.mode == "sequence" else "rows"
            wanted = WANTED[shared].get(job.cards)
            numbers = [row.get("speedup"), wanted, row.get("of one's state")]
            found.append([job.config, job.mode, job.cards, *numbers])
    return found
