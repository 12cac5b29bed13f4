"""Blocks of one shape are traced once: each of them calls the same jitted function.

A training step of L blocks is then traced, differentiated, transposed and lowered as one block and
L calls of it, which XLA inlines: the compiled program is that of L blocks.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import module as flax_module
from jax.core import Tracer

from gt_jax.models.config import ModelConfig
from gt_jax.models.fsdp import is_cut
from gt_jax.models.fusion import FUSIONS
from gt_jax.models.layers import is_launch_bound
from gt_jax.models.rounding import rounded_together

_apart = contextvars.ContextVar("apart", default=False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Models traced inside hold the equations of all blocks in one jaxpr, for who reads it."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def caller(
    model: nn.Module,
    block: Callable,
    config: ModelConfig,
    *,
    alike: int,
    random: bool,
) -> Callable:
    """How a model applies its blocks: traced once where nothing tells them apart.

    Args:
        model: the bound module that the blocks stand in.
        block: (config, layer) -> module.
        config: of the model.
        alike: the layer from which on blocks differ in how they are initialised and nothing else.
        random: whether blocks draw random numbers, each from a key of its own.

    Returns:
        call(layer, x, *inputs): the results of block `layer` of the model.
    """
    of_its_own = lambda layer, *inputs: block(config, layer, name=f"blocks_{layer}")(*inputs)
    # Sharing would change which collectives of cut parameters a step has.
    if random or is_cut() or _apart.get() or not _is_staged() or are_shown(model):
        return of_its_own
    recording = model.is_mutable_collection("activations")

    @functools.cache
    def params_of(few_numbers):
        """Of all blocks; None for one without."""
        names = (f"blocks_{layer}" for layer in range(config.layers))
        params = [model.get_variable("params", name) for name in names]
        if not few_numbers:
            return params
        kinds = ("only_in_products", "only_in_differences")
        of_fusion = (getattr(FUSIONS[config.fusion], kind, ()) for kind in kinds)
        return rounded_together(params, config.dtype, *of_fusion)

    # New for every trace: one kept between traces would not see what a context has changed.
    @functools.partial(jax.jit, static_argnums=0)
    def one_block(module, params, *inputs):
        mutable = ["activations"] if recording else []
        return module.apply({"params": params}, *inputs, mutable=mutable)

    def together(layer, x, *inputs):
        name = f"blocks_{layer}"
        numbers, *_ = jax.tree.leaves(x)  # a stream.Sum is two arrays
        few_numbers = config.dtype == "bfloat16" and numbers.shape[1] > 1
        few_numbers = few_numbers and is_launch_bound(numbers)
        params = params_of(few_numbers)[layer]
        if params is None:
            return of_its_own(layer, x, *inputs)  # which says what is missing
        module = block(config, min(layer, alike), parent=None)
        with jax.named_scope(name):
            results, recorded = one_block(module, params, x, *inputs)
        if "activations" in recorded:
            model.put_variable("activations", name, recorded["activations"])
        return results

    return together


def intercepted() -> bool:
    """Whether somebody looks at the calls of modules (flax.linen.intercept_methods).

    That is not public in Flax; where it is elsewhere, the answer is yes.
    """
    return bool(getattr(flax_module, "_global_interceptor_stack", True))


def are_shown(model: nn.Module) -> bool:
    """Whether somebody looks into single blocks: makes, captures or intercepts what is theirs."""
    kept = map(model.is_mutable_collection, ("params", "intermediates"))
    recorded_before = model.has_variable("activations", "blocks_0")
    return any(kept) or intercepted() or recorded_before


def _is_staged() -> bool:
    """Whether a program is being traced: op by op, jax.jit would compile anew at every call.

    Under jax.vmap or jax.grad alone, whatever does not depend on their inputs is computed at once.
    """
    return isinstance(jnp.zeros(()), Tracer)
