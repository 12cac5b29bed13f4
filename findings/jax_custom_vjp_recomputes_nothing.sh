#!/usr/bin/env bash
# jax and jaxlib 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12) on a CPU, 2026-12-01.
#
# An activation with a custom_vjp that keeps nothing but its bfloat16 input, and computes its float32 parts again in the
# backward pass, should cost two bytes a number of memory between the passes: that is why one writes it so, and that is
# what jax.vjp reports as residuals.
# Compiled in one program, both passes compute the same expression of the same array, and XLA makes one of them: it keeps
# the float32 result from the forward pass to the backward, four bytes a number on top of the two. For eight layers of
# 16384 x 512 numbers that is 7 x 32 MiB more than with an optimization_barrier on the input in the backward pass.
# jax.checkpoint places such barriers itself, unless its argument prevent_cse is False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/show.py" <<'PY'
import jax
import jax.numpy as jnp

ROWS, WIDTH, LAYERS = 16384, 512, 8


def parts(x):
    """The input in float32 and Phi of it."""
    wide = x.astype(jnp.float32)
    return wide, 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))


def make(barrier):
    @jax.custom_vjp
    def gelu(x):
        wide, phi = parts(x)
        return (wide * phi).astype(x.dtype)

    def backward(x, g):
        wide, phi = parts(jax.lax.optimization_barrier(x) if barrier else x)
        slope = phi + wide * jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
        return ((g.astype(jnp.float32) * slope).astype(x.dtype),)

    gelu.defvjp(lambda x: (gelu(x), x), backward)

    def loss(weights, x):
        for w in weights:
            x = gelu(x @ w)
        return jnp.sum(x.astype(jnp.float32))

    return loss


def mebibytes(arrays):
    return sum(z.size * z.dtype.itemsize for z in arrays) / 2**20


weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)] * LAYERS
x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)
kept, temporary = [], []
for barrier in (False, True):
    loss = make(barrier)
    residuals = jax.tree.leaves(jax.eval_shape(lambda *z: jax.vjp(loss, *z)[1], weights, x))
    kept.append((mebibytes(residuals), {str(z.dtype) for z in residuals}))
    compiled = jax.jit(jax.grad(loss)).lower(weights, x).compile()
    temporary.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
print(jax.__version__, "the same residuals:", kept[0] == kept[1], *kept[0][1])
print(f"    temporaries without the barrier less those with it: {temporary[0] - temporary[1]:.0f} MiB")
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
expected="0.10.2 the same residuals: True bfloat16
    temporaries without the barrier less those with it: 224 MiB
0.12.0.1 the same residuals: True bfloat16
    temporaries without the barrier less those with it: 224 MiB
"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo -n "$expected"; exit 1; }
