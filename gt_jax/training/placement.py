"""Where the arrays of a run live on its devices."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P


def placed(mesh: Mesh, spec: P) -> Sharding:
    """Where an array lives that a mesh cuts as `spec` says.

    A lone device cuts nothing. There the sharding names no mesh, since JAX traces a function again
    where only the mesh of an argument differs: arguments of a step would have one and results of
    kernels none, and the backward pass of a block would be traced, lowered and compiled twice.
    """
    if mesh.size == 1:
        return SingleDeviceSharding(mesh.devices.item())
    return NamedSharding(mesh, spec)


def one_device(mesh: Mesh) -> Sharding:
    """On the device of this process that `on_one_device` chooses."""
    return SingleDeviceSharding(mesh.local_devices[0])


def on_one_device(tree: Any, mesh: Mesh) -> Any:
    """A tree on a device of this process, that of `one_device`, where each device has all of it.

    What "fsdp" cuts stays as it is in a single process, and is put together first where there are
    several, in which all of them take part.
    """
    leaves = jax.tree.leaves(tree)
    if not all(x.is_fully_replicated for x in leaves):
        if all(x.is_fully_addressable for x in leaves):
            return tree
        tree = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
