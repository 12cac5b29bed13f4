"""What kernels.py measured, as tables and as a plot."""

import numpy as np

PASSES = ("forward", "backward", "both")


def print_group(op, shape, rows):
    """A table of one shape."""
    B, T, H, size = shape
    floor = rows[0]
    print(f"\n{op} B={B} T={T} H={H} {'K' if op == 'wkv6' else 'N'}={size}, ms")
    titles = f"{'forward':>17}{'backward':>17}{'both':>17}  over floor"
    print(f"  {'':22}{titles}  extra MiB  kept MiB  compile s   error")
    for row in rows:
        line = f"  {row['who']:22}"
        if "reason" in row:
            print(line + "  " + row["reason"])
            continue
        for part in PASSES:
            spread = f" ± {row[part]['spread']:.3f}" if "spread" in row[part] else " " * 8
            line += f"{row[part]['ms']:9.3f}{spread}"
        if row is not floor:
            kept = f"{row['kept_bytes'] / 2**20:10.0f}" if "kept_bytes" in row else " " * 10
            line += f"{row['both']['ms'] / floor['both']['ms']:12.2f}"
            line += f"{row['extra_bytes'] / 2**20:11.0f}{kept}{row['compile_seconds']:11.1f}"
        if "errors" in row:
            line += f"{max(row['errors'].values()):8.1e}"
        if "halves" in row:
            line += f"  halves {max(row['halves'].values()):.1e}"
        print(line, flush=True)


def print_linearity(rows):
    """How far times of a sweep stray from the nearest line: so much a call and so much a token."""
    print()
    for (op, who, size), series in by_length(rows).items():
        lengths = np.array([row["shape"][1] for row in series])
        if len(lengths) < 3:  # any two lie on a line
            continue
        for part in ("forward", "both"):
            ms = np.array([row[part]["ms"] for row in series])
            terms = np.stack([1 / ms, lengths / ms], axis=1)  # relative errors weigh the same
            a_call, a_token = np.linalg.lstsq(terms, np.ones(len(ms)), rcond=None)[0]
            stray = np.max(np.abs(terms @ (a_call, a_token) - 1))
            line = f"{1e3 * a_call:.0f} us + {1e6 * a_token:.1f} ns a token"
            over = f"T={lengths[0]} to {lengths[-1]}"
            print(f"{op} {size} {who}, {part}: {line}, to {100 * stray:.1f} % over {over}")


def by_length(rows):
    """(op, who, the shape but for its length) -> the rows with times, from short to long."""
    series = {}
    for row in sorted(rows, key=lambda row: row["shape"][1]):
        if "both" in row:
            B, _, *rest = row["shape"]
            series.setdefault((row["op"], row["who"], (B, *rest)), []).append(row)
    return series


def draw(rows, device, path):
    """Time against length, for each operation at the batch and heads with the most lengths."""
    from matplotlib.figure import Figure  # slow to import

    series = by_length(rows)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure = Figure(figsize=(5.5 * len(ops), 4.5), layout="constrained")
    figure.suptitle(f"forward (dashed) and forward + backward, {device}")
    for ax, op in zip(figure.subplots(1, len(ops), squeeze=False)[0], ops):
        floors = {
            size: mine for (o, who, size), mine in series.items() if (o, who) == (op, "floor")
        }
        size = max(floors, key=lambda size: len(floors[size]))
        names = [who for o, who, s in series if (o, s) == (op, size)]
        for n, who in enumerate(names):
            mine = series[op, who, size]
            style = {"color": "black", "lw": 1} if who == "floor" else {"color": f"C{n}"}
            lengths = [row["shape"][1] for row in mine]
            for part, dashes, label in (("forward", "--", None), ("both", "-", who)):
                times = [row[part]["ms"] for row in mine]
                marker = None if who == "floor" else "o"
                ax.loglog(lengths, times, dashes, marker=marker, ms=3.5, label=label, **style)
        B, H, state = size
        ax.set_title(f"{op}, B={B}, H={H}, {'K' if op == 'wkv6' else 'N'}={state}")
        ax.set(xlabel="tokens per sequence", ylabel="ms")
        ax.legend(frameon=False, fontsize="small")
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
