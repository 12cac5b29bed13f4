#!/usr/bin/env bash
# jax and jaxlib 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12) on a CPU, 2026-11-30.
#
# The causal convolution of Mamba's blocks is depthwise: each channel by its own four taps. One would expect
# lax.conv_general_dilated with feature_group_count, which says just that, to be at least as fast as four shifted copies
# times a tap each, which read the input four times where they are not fused.
# XLA for CPUs computes the grouped convolution by a loop of its own: on 64 x 64 tokens of 512 channels in float32, on two
# cores, it took 81 times as long in 0.10.2 and 56 times as long in 0.12.0.1 (25 times on another day).
# Why one looks: Mamba in PyTorch is written with a grouped convolution, and whoever ports it takes over the call.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/show.py" <<'PY'
import statistics
import sys
import time

import jax
import jax.numpy as jnp

TAPS, CHANNELS = 4, 512
x = jax.random.normal(jax.random.key(0), (64, 64, CHANNELS))
taps = jax.random.normal(jax.random.key(1), (TAPS, CHANNELS))


@jax.jit
def grouped(x):
    return jax.lax.conv_general_dilated(
        x, taps[:, None], (1,), [(TAPS - 1, 0)], feature_group_count=CHANNELS,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )


@jax.jit
def shifted(x):
    padded = jnp.pad(x, ((0, 0), (TAPS - 1, 0), (0, 0)))
    return sum(taps[i] * padded[:, i : i + x.shape[1]] for i in range(TAPS))


def seconds(function):
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        function(x).block_until_ready()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


same = bool(jnp.allclose(grouped(x), shifted(x), atol=1e-4))
ratio = seconds(grouped) / seconds(shifted)
print(jax.__version__, "same values:", same, "more than five times as long:", ratio > 5, flush=True)
print(f"ratio {ratio:.1f}", file=sys.stderr)
PY
show() {  # show PYTHON PACKAGE ...: in a new environment of that version
  local python versions=$1
  shift
  for python in "$HOME"/.pyenv/versions/$versions.*/bin/python python$versions; do
    "$python" -m venv --clear "$work/venv" 2>/dev/null && break
  done
  "$work/venv/bin/pip" install -q "$@"
  JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/show.py"
}
found=$(show 3.11 jax==0.10.2 jaxlib==0.10.2)$'\n'
found+=$(show 3.12 jax==0.12.0.1 jaxlib==0.12.0.1)$'\n'
echo -n "$found"
expected="0.10.2 same values: True more than five times as long: True
0.12.0.1 same values: True more than five times as long: True
"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo -n "$expected"; exit 1; }
