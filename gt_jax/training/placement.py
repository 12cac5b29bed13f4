"""Where the arrays of a run live on its devices."""

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
