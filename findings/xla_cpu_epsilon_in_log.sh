#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU, Python 3.11, 2026-11-29 (0.12.0.1 on Python 3.12 gives 0 in both).
#
# The entropy of a gate, -w log(w + e) - (1 - w) log(1 - w + e), has an epsilon so that it is finite at w = 1. One would
# expect jit to keep it: it does not promise the last bits, but floats are not associative and 1 - w + e is e here.
# Under jit the sum comes out as (1 + e) - w, where 1e-8 is lost beside 1 in float32: log(0) * 0 is NaN.
# log(maximum(1 - w, e)) is safe.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$work/show.py" <<'PY'
import jax
import jax.numpy as jnp

e = 1e-8


def entropy(w):
    return -w * jnp.log(w + e) - (1 - w) * jnp.log(1 - w + e)


def safe(w):
    return -w * jnp.log(jnp.maximum(w, e)) - (1 - w) * jnp.log(jnp.maximum(1 - w, e))


w = jnp.ones(1)
print("op by op:", entropy(w), "jit:", jax.jit(entropy)(w), "jit, maximum:", jax.jit(safe)(w) + 0)
print("1 - w + 1e-6, op by op and jit:", 1 - w + 1e-6, jax.jit(lambda w: 1 - w + 1e-6)(w))
PY
found=$(JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/show.py" 2>/dev/null)
echo "$found"
expected="op by op: [0.] jit: [nan] jit, maximum: [0.]
1 - w + 1e-6, op by op and jit: [1.e-06] [9.536743e-07]"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo "$expected"; exit 1; }
