"""Runs side by side: all their steps, or those that an interrupted command had left."""

import time
from collections.abc import Callable

import jax
import numpy as np

from experiments.lab import programs, unfinished


def train(
    compiled: programs.Compiled,
    start: int,
    place: unfinished.Place | None,
    keep_params: bool,
    show: Callable[[str], None],
):
    """Train a group to its end.

    Args:
        compiled: the program.
        start: the first of its runs that train here.
        place: where the state is kept between evaluations; what it has is continued.
        keep_params: whether the parameters are wanted.
        show: takes a line about where training continues.

    Returns:
        metrics name -> [runs, steps, ...]; nats and correct [runs, evaluations, batches]; params
        [runs, ...] or None; the seconds, of all commands that it took.
    """
    program, began = compiled.program, time.perf_counter()
    which = slice(start, start + compiled.group)
    seeds, values, of_run, data = programs.inputs_of(program, which, compiled.group)
    held_out = jax.device_put(programs.stacked(program.task.held_out))
    values, of_run = jax.device_put((values, of_run))
    feeds = [program.task.batches(seed) for seed in data]
    states = compiled.init(seeds, values)
    metrics, measured, pending, done = [], [], None, 0
    stretches = programs.steps_between_evaluations(program.config)
    if found := place and place.load():
        done, seconds, states = _restore(found, states, feeds, metrics, measured)
        began -= seconds
        show(f"continues after {sum(stretches[:done])} steps, as kept in {place.path}")
    for i, steps in enumerate(stretches[done:], done):
        positions = [feed.state() for feed in feeds] if place else None
        # One batch of every seed for every step: [steps, data, B, ...]
        of_step = [programs.stacked(next(feed) for feed in feeds) for _ in range(steps)]
        batches = programs.stacked(of_step)
        saved = None
        if i > done and place and place.due():
            _keep(pending, metrics, measured)
            pending = None
            about = {"done": i, "seconds": time.perf_counter() - began, "positions": positions}
            saved = about, _arrays(states, metrics, measured)
        states, numbers = compiled.advance[steps](states, values, of_run, batches)
        measured_params = jax.vmap(lambda state: state.evaluated)(states)
        sums = compiled.measure(measured_params, held_out)
        if saved:  # written while the next steps run
            place.save(*saved)
        if pending:  # read while the next steps run
            _keep(pending, metrics, measured)
        pending = numbers, sums
    _keep(pending, metrics, measured)
    metrics = jax.tree.map(lambda *x: np.concatenate(x).swapaxes(0, 1), *metrics)
    nats, correct = jax.tree.map(lambda *x: np.stack(x).transpose(2, 0, 1), *measured)
    params = jax.device_get(measured_params) if keep_params else None
    return metrics, nats, correct, params, time.perf_counter() - began


def _arrays(states, metrics, measured) -> dict[str, np.ndarray]:
    """Arrays for a Place: the states' in their order, and what was read so far, joined."""
    leaves = jax.device_get(jax.tree.leaves(states))
    arrays = {f"state {i}": np.array(leaf) for i, leaf in enumerate(leaves)}
    arrays |= {f"metric {name}": np.concatenate([m[name] for m in metrics]) for name in metrics[0]}
    nats, correct = (np.stack(each) for each in zip(*measured))
    return arrays | {"nats": nats, "correct": correct}


def _restore(found, states, feeds, metrics, measured):
    """Stretches that are done, their seconds and the states, of what a Place has.

    Feeds go where they were, and what was read so far is added to metrics and measured.
    """
    about, arrays = found
    for feed, position in zip(feeds, about["positions"], strict=True):
        feed.restore(position)
    known = "metric "
    metrics.append({n.removeprefix(known): x for n, x in arrays.items() if n.startswith(known)})
    measured.extend(zip(arrays["nats"], arrays["correct"]))
    leaves, tree = jax.tree.flatten(states)
    saved = [arrays[f"state {i}"].view(leaf.dtype) for i, leaf in enumerate(leaves)]
    return about["done"], about["seconds"], jax.device_put(jax.tree.unflatten(tree, saved))


def _keep(pending, metrics, measured):
    numbers, sums = jax.device_get(pending)
    metrics.append(numbers)
    measured.append(sums)
