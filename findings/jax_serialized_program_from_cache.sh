#!/usr/bin/env bash
# jax 0.10.2, Python 3.11, 2026-11-30 (0.11.2 and 0.12.0.1 on Python 3.12 do the same).
#
# jax.experimental.serialize_executable writes a compiled program to a file for another process. Whether XLA compiled it
# just now or JAX took it from its persistent compilation cache should make no difference: both run here.
# On a CPU the file of a program from the cache is smaller, writing and loading it raise nothing, and only the call of
# the loaded program fails, because its machine code is not in the file. Whoever keeps programs has to find out whether
# the cache was hit (the event /jax/compilation_cache/cache_hits) and keep only what XLA compiled.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$work/show.py" <<'PY'
import pickle
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))


def program(x):
    return jnp.sin(x) * 2 + jnp.cos(x @ x)


kind, path = sys.argv[1:]
if kind == "write":
    compiled = jax.jit(program).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    stored = serialize_executable.serialize(compiled)
    with open(path, "wb") as file:
        pickle.dump(stored, file)
    print("written", "after a hit" if any(hits) else "after compiling")
else:
    with open(path, "rb") as file:
        loaded = serialize_executable.deserialize_and_load(*pickle.load(file))
    print("loaded", end=", ")
    try:
        print("sum", round(float(loaded(jnp.ones((64, 64))).sum())))
    except Exception as error:
        print(type(error).__name__, str(error).split(":")[0])
PY
show() {
  JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$work/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
    "$work/venv/bin/python" "$work/show.py" "$@" 2>/dev/null
}
found=$(
  show write "$work/compiled"
  show write "$work/from_cache"
  [ "$(wc -c < "$work/from_cache")" -lt "$(wc -c < "$work/compiled")" ] && echo "the second file is smaller"
  show load "$work/compiled"
  show load "$work/from_cache"
)
echo "$found"
expected="written after compiling
written after a hit
the second file is smaller
loaded, sum 8498
loaded, JaxRuntimeError INTERNAL"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo "$expected"; exit 1; }
