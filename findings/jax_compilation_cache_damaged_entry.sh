#!/usr/bin/env bash
# jax 0.10.2, Python 3.11, 2026-11-29 (0.12.0.1 on Python 3.12 does the same).
#
# A file of the persistent compilation cache was cut short (a full disk, a copy that broke off). One would expect the
# entry to be written anew when the program has been compiled again: the miss that follows is a miss like any other.
# The entry stays as it is: each later process warns, compiles again and leaves the damaged file in its place, so the
# program is never cached again until somebody deletes the file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$work/show.py" <<'PY'
import warnings

import jax
import jax.numpy as jnp

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/")[-1]))


def product(x):
    return x @ x


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(product).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
about_it = [str(warning.message).split(" for ")[0] for warning in caught]
print("hits", events.count("cache_hits"), "misses", events.count("cache_misses"), about_it)
PY
start() {
  JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$work/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
    "$work/venv/bin/python" "$work/show.py" 2>/dev/null
}
found=$(
  start
  start
  entry=$(ls "$work"/cache/jit_product-*-cache)
  head -c 100 "$entry" > "$work/cut" && cp "$work/cut" "$entry"
  echo "cut to $(wc -c < "$entry") bytes"
  start
  start
  echo "still $(wc -c < "$entry") bytes"
)
echo "$found"
expected="hits 0 misses 1 []
hits 1 misses 0 []
cut to 100 bytes
hits 0 misses 1 ['Error reading persistent compilation cache entry']
hits 0 misses 1 ['Error reading persistent compilation cache entry']
still 100 bytes"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo "$expected"; exit 1; }
