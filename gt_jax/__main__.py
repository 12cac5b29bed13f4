"""Every program of gt_jax by name: `gt-jax train ...` is `python -m gt_jax.train ...`.

gt-jax train --config=gf_mh
gt-jax generate --checkpoint=runs/gf_mh --prompt="ROMEO:"
"""

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

import gt_jax
from gt_jax.errors import did_you_mean
from gt_jax.starting import end_at_ctrl_c

PROGRAMS = (
    *("prepare", "train", "evaluate", "generate", "serve", "inspect", "convert"),
    *("models", "canaries", "harness", "corpus"),
)


def about(name: str) -> str:
    """First line of a program's docstring, read without importing it."""
    spec = importlib.util.find_spec(f"gt_jax.{name}")
    assert spec is not None and spec.origin is not None, f"gt_jax.{name} has no file"
    path = Path(spec.origin)
    if path.name == "__init__.py":
        path = path.with_name("__main__.py")
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring is not None, f"{path} has no docstring"
    return docstring.splitlines()[0]


def main() -> None:
    """Run the program that the command line names; without a name, list them all."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"gt_jax {gt_jax.__version__}")
    elif name in ("--help", "-h", "help"):
        print("gt-jax PROGRAM [--help] ..., or python -m gt_jax.PROGRAM\n")
        for program in PROGRAMS:
            print(f"  {program:9} {about(program)}")
    elif name in PROGRAMS:
        sys.argv[:2] = [f"gt-jax {name}"]
        end_at_ctrl_c()
        runpy.run_module(f"gt_jax.{name}", run_name="__main__", alter_sys=False)
    else:
        hint = did_you_mean(name, PROGRAMS) or f"; there are {', '.join(PROGRAMS)}"
        print(f"error: {name!r} is not a program of gt_jax{hint}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
