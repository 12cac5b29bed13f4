"""Print every preset with its exact parameter counts.

    python -m gt_jax.models

"legacy" counts the model with model.branch=legacy, "embedding" the embedding,
its output head if it has one of its own, and segment vectors; "other" is the
rest. What is wider than the terminal becomes several tables.
"""

import os
import sys
from collections.abc import Iterator, Sequence

from gt_jax import terminal
from gt_jax.models.language_model import count_parameters
from gt_jax.models.presets import ALIASES, PRESETS, make_config


def rows() -> Iterator[tuple[str, ...]]:
    """A header, then the cells of one preset's line at a time."""
    yield (
        *("preset", "architecture", "fusion", "dim", "layers", "heads", "vocab"),
        *("parameters", "legacy", "embedding", "other", "about"),
    )
    for name, preset in PRESETS.items():
        fields = {"vocab_size": preset.vocab_size, "impl": "reference"}  # the quickest to trace
        config = make_config(name, **fields)
        counts = count_parameters(config)
        has_branch = config.architecture in ("hybrid", "rwkv6")
        legacy = "-"
        if has_branch:
            legacy_config = make_config(name, **fields, branch="legacy")
            legacy = f"{count_parameters(legacy_config)['total']:,}"
        heads = config.mamba_heads if config.architecture == "mamba2" else config.heads
        embedding = sum(counts.get(part, 0) for part in ("embedding", "segment_embedding", "head"))
        names = [name, *(alias for alias, target in ALIASES.items() if target == name)]
        yield (
            *(", ".join(names), config.architecture),
            config.fusion if config.architecture == "hybrid" else "-",
            *(str(config.dim), str(config.layers), str(heads), str(config.vocab_size)),
            *(f"{counts['total']:,}", legacy, f"{embedding:,}"),
            *(f"{counts['total'] - embedding:,}", preset.about),
        )


def main(arguments: Sequence[str] = ()) -> None:
    """Print the table, or the help; any other argument is a mistake."""
    if arguments and arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    if arguments:
        print(f"error: {arguments[0]} is not a flag; there is only --help", file=sys.stderr)
        sys.exit(1)
    lines = terminal.table(list(rows()), texts=(0, 1, 2, 11))
    try:
        print("\n".join(lines))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; Python would flush again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main(sys.argv[1:])
