"""The table of cross_compile.py, and what the one in gt_jax/kernels/COMPILED.md says otherwise."""

import re
from pathlib import Path

TABLE = Path(__file__).parent.parent / "gt_jax/kernels/COMPILED.md"
GPUS = {
    "8.0": "A100",
    "8.6": "A10, RTX 30",
    "8.9": "L4, RTX 40",
    "9.0": "H100, H200",
    "10.0": "B200",
    "12.0": "RTX 50",
}


def as_table(rows):
    """Markdown: a row a kernel, registers / spilled bytes of each GPU."""
    import jax

    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    lines = [
        "# Kernels compiled for GPUs that were not there",
        "",
        f"JAX {jax.__version__}; registers / bytes spilled, both of a thread, and KiB of shared "
        "memory of a block. `python .ci/cross_compile.py --wheels FOLDER --write "
        "gt_jax/kernels/COMPILED.md` repeats it.",
        "",
        "| | " + " | ".join(f"{gpu} ({GPUS[gpu]})" for gpu in gpus) + " | shared memory |",
        "|---" * (len(gpus) + 2) + "|",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of_kernel = {row["gpu"]: row for row in rows if row["kernel"] == kernel}
        cells = []
        for gpu in gpus:
            row = of_kernel.get(gpu)
            if row is None:
                cells.append("")
            else:
                cells.append(
                    "fails" if "error" in row else f"{row['registers']} / {row['spilled']}"
                )
        shared = max(row.get("shared", -1) for row in of_kernel.values())
        lines.append(f"| {kernel} | " + " | ".join(cells) + f" | {shared / 1024:.0f} |")
    return "\n".join(lines)


def outdated(table, stored):
    """What a stored table says that a new one does not, if both are of the same JAX.

    Another JAX compiles the same kernels to other code.
    """
    (new_version, new), (version, old) = read_table(table), read_table(stored)
    if version != new_version:
        print(f"{TABLE.name} is of {version}, not compared")
        return
    for (kernel, gpu), cell in new.items():
        before = old.get((kernel, gpu), "nothing")
        if cell != before:
            yield f"{TABLE.name} has {before} for {kernel}, {gpu}, which is {cell}: use --write"
    gpus = {gpu for _, gpu in new}
    for kernel, gpu in sorted(old.keys() - new.keys()):
        if gpu in gpus:
            yield f"{TABLE.name} has {kernel}, {gpu}, which is not compiled: use --write"


def read_table(text):
    """("JAX 0.12.0.1", {(kernel, GPU): registers and spilled bytes}) of what as_table wrote."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    [_, *gpus, _], _, *rows = filter(None, lines)
    cells = {(kernel, gpu): cell for kernel, *row, _ in rows for gpu, cell in zip(gpus, row)}
    version = re.search(r"^JAX [\w.]+", text, re.MULTILINE)[0].rstrip(".;")
    return version, {key: cell for key, cell in cells.items() if cell}
