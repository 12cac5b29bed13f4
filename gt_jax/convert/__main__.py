"""Read models of other libraries, write ours for them, and make models out of models.

    python -m gt_jax.convert import SRC DST [--tokenizer=FILE]
    python -m gt_jax.convert export SRC DST [--format=NAME] [--licence=NAME]
    python -m gt_jax.convert graft DST --rwkv=SRC --mamba=SRC [--fusion=gf] [--gate=0.3]
    python -m gt_jax.convert expand SRC DST [--layers=16] [--dim=256]

graft: a hybrid of the branches of a pure RWKV-6 and a pure Mamba-2 model of the same width, depth
and tokenizer.
expand: a model of more blocks or a multiple of the width that computes what SRC does.
Either is trained on by python -m gt_jax.train with --config.model.init_from=DST.
import: SRC is a file of weights (.pth, .safetensors) or a folder of config.json and weights; DST
becomes a folder for `gt_jax.load` and `gt_jax.generate`. No code in SRC is run.
export: SRC is what `gt_jax.load` takes. A hybrid needs no --format: "pytorch" takes every model,
the others a pure RWKV-6 or Mamba-2. NAME is one of
"""

import functools

from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.errors import InputError


def main(argv: list[str]) -> None:
    from gt_jax.convert import LAYOUTS, export_model, import_model
    from gt_jax.convert.expand import expand
    from gt_jax.convert.graft import graft

    formats = "\n".join(f"  {name:10} {layout.about}" for name, layout in LAYOUTS.items())
    flags = cli.new_flags()
    text, number, share = (
        functools.partial(define, flag_values=flags)
        for define in (absl_flags.DEFINE_string, absl_flags.DEFINE_integer, absl_flags.DEFINE_float)
    )
    text(
        "tokenizer",
        None,
        'import: a tokenizer.json, an RWKV vocabulary, or "ids" for none. Default: beside SRC.',
    )
    text("format", None, "export: the format to write; a hybrid has one only, pytorch.")
    text("licence", None, "export: licence of the weights for the model card, such as apache-2.0.")
    text("rwkv", None, "graft: the RWKV-6, a run or a converted model.")
    text("mamba", None, "graft: the Mamba-2, a run or a converted model.")
    text("fusion", "gf", "graft: how the branches are joined.")
    share("gate", None, "graft: share of RWKV at first, between 0 and 1; default: the fusion's.")
    text(
        "rest", "mamba", "graft: whose embedding, head and last norm it takes: rwkv, mamba or new."
    )
    number("layers", None, "expand: number of blocks of DST; default: as SRC.")
    number("dim", None, "expand: width of DST, a multiple of SRC's; default: as SRC.")
    number("seed", 0, "graft, expand: seed of the new parameters.")
    words = [word for word in argv[1:] if not word.startswith("--")]
    options = [word for word in argv[1:] if word.startswith("--")]
    if not cli.parse(flags, [argv[0], *options], usage=f"{__doc__}{formats}"):
        return
    match words:
        case ["import", source, target]:
            print(import_model(source, target, tokenizer=flags.tokenizer))
        case ["export", source, target]:
            print(export_model(source, target, layout=flags.format, licence=flags.licence))
        case ["graft", target] if flags.rwkv and flags.mamba:
            print(
                graft(
                    flags.rwkv,
                    flags.mamba,
                    target,
                    fusion=flags.fusion,
                    gate=flags.gate,
                    rest=flags.rest,
                    seed=flags.seed,
                )
            )
        case ["expand", source, target]:
            print(expand(source, target, layers=flags.layers, dim=flags.dim, seed=flags.seed))
        case _:
            raise InputError(
                "say import SRC DST, or export SRC DST --format=NAME, "
                "graft DST --rwkv=SRC --mamba=SRC, expand SRC DST --layers=N; see --help"
            )


if __name__ == "__main__":
    cli.run(main)
