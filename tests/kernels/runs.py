"""Which kernels a traced program runs, and how often."""

from collections import Counter
from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr


def runs_of_kernels(program: Jaxpr | ClosedJaxpr) -> Counter:
    """Name of a kernel -> how often the program runs it; a loop's body counts once."""
    return Counter(equation.params["name"] for equation in calls_of_kernels(program))


def calls_of_kernels(program: Jaxpr | ClosedJaxpr) -> Iterator:
    """The equations of a program that call a kernel, each as often as a function that is called."""
    for equation in getattr(program, "jaxpr", program).eqns:
        if equation.primitive.name == "mpmd_map":
            yield equation
            continue
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if isinstance(part, Jaxpr | ClosedJaxpr):
                    yield from calls_of_kernels(part)
