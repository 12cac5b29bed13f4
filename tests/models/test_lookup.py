import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.models.lookup import lookup, sum_by_index


def draw(size, tokens, kind):
    rng = np.random.default_rng(0)
    index = {
        "uniform": rng.integers(size, size=tokens),
        "one token": np.full(tokens, size - 1),
        "skewed": np.minimum(rng.zipf(1.3, size=tokens) - 1, size - 1),
        "ascending": np.sort(rng.integers(size, size=tokens)),
    }[kind]
    return rng.standard_normal((tokens, 6)).astype(np.float32), index.astype(np.int32)


@pytest.mark.parametrize("kind", ["uniform", "one token", "skewed", "ascending"])
@pytest.mark.parametrize("size, tokens", [(7, 50), (129, 1), (130, 128), (300, 1000), (2000, 513)])
def test_rows_are_summed_by_index(size, tokens, kind):
    """Against NumPy in float64; sums of up to 1000 float32 numbers keep 5 digits of the largest."""
    rows, index = draw(size, tokens, kind)
    expected = np.zeros((size, 6))
    np.add.at(expected, index, rows)
    found = jax.jit(sum_by_index, static_argnums=2)(rows, index, size)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert found.dtype == jnp.float32
    absent = np.setdiff1d(np.arange(size), index)
    assert not np.asarray(found)[absent].any()


@pytest.mark.parametrize("size", [7, 300])
def test_lookup_is_take_and_so_is_its_gradient(size):
    """Indices beyond the table give NaN and no gradient; also under vmap."""
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.standard_normal((2, size, 5)), jnp.float32)
    index = jnp.asarray(rng.integers(size + 2, size=(3, 70)))
    weight = jnp.asarray(rng.standard_normal((3, 70, 5)), jnp.float32)

    def taken(table, index):
        return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)

    def total(f, table):
        return jnp.sum(jnp.where(index[..., None] < size, f(table, index), 0) * weight)

    np.testing.assert_array_equal(lookup(table[0], index), taken(table[0], index))
    grads = [jax.vmap(jax.grad(lambda t, f=f: total(f, t)))(table) for f in (lookup, taken)]
    np.testing.assert_allclose(*grads, atol=1e-5)


def test_gradient_adds_nothing_in_an_order_of_chance():
    """Scatters only write, each place once; a scatter that adds has no fixed order on a GPU."""
    table, index = jnp.zeros((200, 4)), jnp.zeros((2, 200), jnp.int32)
    text = jax.jit(jax.grad(lambda t: lookup(t, index).sum())).lower(table).as_text()
    assert text.count('"stablehlo.scatter"') == text.count("unique_indices = true") == 2
