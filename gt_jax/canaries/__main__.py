"""Score a checkpoint's behaviours: recall, combination, dialogue, form, persona, separation.

    python -m gt_jax.canaries --checkpoint=runs/gf_mh --suite=minimal
    python -m gt_jax.canaries --checkpoint=runs/finch --suite=extended --json=finch.json

Suites: tiny, minimal, standard (11 canaries), extended (17). Each asks for the checks S0 to S4 of
the state and for an average that grows with the model; a category below 50 % fails it. Compare
with an attention model of the same size, trained on the same text.
"""

import json
from pathlib import Path

from absl import flags as absl_flags

from gt_jax import checkpoint, cli
from gt_jax.canaries import SUITES, describe, run


def main(argv: list[str]) -> None:
    flags = cli.new_flags()
    define, integer = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    define("checkpoint", None, "A run, one checkpoint or a converted model.", flag_values=flags)
    absl_flags.DEFINE_enum(
        "suite", "standard", list(SUITES), "Which canaries to ask.", flag_values=flags
    )
    define("json", None, "File to write the results to.", flag_values=flags)
    integer("items", 20, "Prompts per canary.", lower_bound=1, flag_values=flags)
    integer(
        "batch_size", 8, "Prompts that are read side by side.", lower_bound=1, flag_values=flags
    )
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint",)):
        return

    model, params, tokenizer = checkpoint.load(flags.checkpoint, say=cli.note)
    result = run(
        model,
        params,
        tokenizer,
        suite=flags.suite,
        items=flags.items,
        batch_size=flags.batch_size,
        say=cli.note,
    )
    print(describe(result))
    if flags.json:
        Path(flags.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
