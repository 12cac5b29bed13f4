"""Collect a corpus of Python programs from pinned packages, for models that outgrow Shakespeare.

    python -m gt_jax.corpus DST
    python -m gt_jax.prepare DST PREPARED
    python -m gt_jax.train --config=gf_mh --config.data.source=PREPARED

The package index, or a mirror that pip is set up for, is all the network it needs. DST holds train,
valid and test, split by package; sources.json with the version and licence of each; LICENSES.
"""

from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.data.packages import PACKAGES, build_corpus
from gt_jax.errors import InputError


def main(argv: list[str]) -> None:
    flags = cli.new_flags()
    about = "File of pinned packages, one NAME==VERSION --hash=sha256:... a line."
    absl_flags.DEFINE_string("packages", str(PACKAGES), about, flag_values=flags)
    words = [word for word in argv[1:] if not word.startswith("--")]
    options = [word for word in argv[1:] if word.startswith("--")]
    if not cli.parse(flags, [argv[0], *options], usage=__doc__):
        return
    if len(words) != 1:
        raise InputError("say DST, the folder to make; flags are --name=value, see --help")
    made = build_corpus(words[0], flags.packages)
    count, repeated = (sum(row[name] for row in made["packages"]) for name in ("files", "repeated"))
    print(
        f"{words[0]}: {made['bytes']:,} bytes in {count:,} files of {len(made['packages'])} "
        f"packages, {repeated:,} repeated files left out\nsha256 of all texts: {made['sha256']}"
    )


if __name__ == "__main__":
    cli.run(main)
