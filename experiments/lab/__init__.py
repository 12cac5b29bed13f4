"""The library of the laboratory: what questions and benchmarks share."""

from experiments.lab.training import (
    Arm,
    Runs,
    Task,
    drawn_task,
    jit,
    make_config,
    settings,
    text_task,
    train,
)

__all__ = [
    "Arm",
    "Runs",
    "Task",
    "drawn_task",
    "jit",
    "make_config",
    "settings",
    "text_task",
    "train",
]
