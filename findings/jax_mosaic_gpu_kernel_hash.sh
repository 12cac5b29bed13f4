#!/usr/bin/env bash
# jax and jaxlib 0.11.2 and 0.12.0.1, Python 3.12 or newer, lowered for CUDA on a machine without a GPU, 2026-11-29.
#
# A Pallas kernel for Mosaic GPU is named in a program by the hash of its code, and one would expect the same kernel in
# two programs of a process to have one hash, so that it is compiled once. On 0.11.2 each lowering has another: its code
# holds a name for debugging files, numbered through the process. XLA then compiles the kernel again for each program
# that has it, and the key of a program in the persistent compilation cache depends on how many kernels were lowered
# before it. On 0.12.0.1 the name is taken out before the hash is made.
# Why one looks: a command that trains, evaluates and writes text lowers the same kernels for several programs, and each
# is seconds of the compiler.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in "$HOME"/.pyenv/versions/3.1[23]*/bin/python python3.12 python3.13; do
  "$python" -m venv "$work/venv" 2>/dev/null && break
done
cat > "$work/show.py" <<'PY'
import re

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

x = jax.ShapeDtypeStruct((128,), jnp.float32)


def increment(source, target):
    target[...] = source[...] + 1


def kernel_hash():
    program = jax.jit(lambda x: plgpu.kernel(increment, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x))
    text = program.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    return re.search(r'kernel_hash = "(.*?)", module', text)[1]


same = kernel_hash() == kernel_hash()
print("jax", jax.__version__, "one kernel, two programs:", "one hash" if same else "two hashes")
PY
show() {
  JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/show.py" 2>/dev/null
}
"$work/venv/bin/pip" install -q jax==0.11.2 jaxlib==0.11.2
found=$(show)$'\n'
"$work/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
found+=$(show)$'\n'
echo -n "$found"
expected="jax 0.11.2 one kernel, two programs: two hashes
jax 0.12.0.1 one kernel, two programs: one hash
"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo -n "$expected"; exit 1; }
