#!/usr/bin/env bash
# optax 0.2.7 with jax 0.10.2, Python 3.11, 2026-11-29.
#
# optax 0.2.7 declares jax>=0.5.3, so pip installs it beside jax 0.10.2 without a word, and `pip check` is content. One
# would expect the two to work together, or pip to refuse them. `import optax` fails: optax sets a JAX option when it is
# imported, and that JAX has dropped it. 0.2.8 no longer sets it. A lower bound that only resolvers have seen says
# nothing: only an environment of all lower bounds, installed and run, does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
try() {
  "$work/venv/bin/pip" install -q "optax==$1" jax==0.10.2 jaxlib==0.10.2
  "$work/venv/bin/pip" check
  "$work/venv/bin/python" - <<'PY'
from importlib.metadata import requires, version

declared = [need for need in requires("optax") if need.startswith("jax>")]
try:
    import optax

    result = "imports"
except Exception as error:
    result = f"{type(error).__name__}: {error}"
print("optax", version("optax"), declared, "jax", version("jax"), "->", result)
PY
}
found=$(try 0.2.7 && try 0.2.8)
echo "$found"
expected="No broken requirements found.
optax 0.2.7 ['jax>=0.5.3'] jax 0.10.2 -> AttributeError: Unrecognized config option: jax_pmap_shmap_merge
No broken requirements found.
optax 0.2.8 ['jax>=0.5.3'] jax 0.10.2 -> imports"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo "$expected"; exit 1; }
