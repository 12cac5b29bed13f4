"""Read models of other libraries, and write ours for them.

    python -m gt_jax.convert import SRC DST [--tokenizer=FILE]
    python -m gt_jax.convert export SRC DST --format=NAME

import: SRC is a file of weights (.pth, .safetensors) or a folder of config.json and weights; DST
becomes a folder for `gt_jax.load` and `gt_jax.generate`. No code in SRC is run.
export: SRC is what `gt_jax.load` takes, of a pure RWKV-6 or Mamba-2 model; NAME is one of
"""

from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.errors import InputError


def main(argv):
    from gt_jax.convert import LAYOUTS, export_model, import_model

    formats = "\n".join(f"  {name:10} {layout.about}" for name, layout in LAYOUTS.items())
    flags = cli.new_flags()
    absl_flags.DEFINE_string(
        "tokenizer",
        None,
        'import: a tokenizer.json, an RWKV vocabulary, or "ids" for none. Default: beside SRC.',
        flag_values=flags,
    )
    absl_flags.DEFINE_string("format", None, "export: what to write.", flag_values=flags)
    words = [word for word in argv[1:] if not word.startswith("--")]
    options = [word for word in argv[1:] if word.startswith("--")]
    if not cli.parse(flags, [argv[0], *options], usage=__doc__ + formats):
        return
    match words:
        case ["import", source, target]:
            print(import_model(source, target, tokenizer=flags.tokenizer))
        case ["export", source, target]:
            print(export_model(source, target, layout=flags.format))
        case _:
            raise InputError("say import SRC DST, or export SRC DST --format=NAME; see --help")


if __name__ == "__main__":
    cli.run(main)
