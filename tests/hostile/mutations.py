"""Seeded damage to valid files, and what every reader must do with it."""

import contextlib
import resource
import struct
import sys
import time

import numpy as np

EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
# JSON values of every kind, in place of any other.
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 8, 1e-6, 0.5, 1e308, -0.0, 2**31, 2**63, 10**30),
    *("", "x", "8", "\ud800", "a\nb", [], [0], [[]], [0.0, 0.1], {}, {"layer": "Mamba1"}),
    *(float("inf"), float("nan"), [9] * 50, "x" * 5000),
)
SECONDS = 2.0  # of computing, for one file of a few kB; thousandths are usual
GROWTH = 300_000_000  # bytes of memory, for all files of a test together


def mutate(rng: np.random.Generator, data: bytes, most: int = 4) -> bytes:
    """`data` with one to `most` random faults."""
    for _ in range(rng.integers(1, most + 1)):
        data = FAULTS[rng.integers(len(FAULTS))](rng, data) or b"\0"
    return data


def _place(rng, data):
    return int(rng.integers(len(data)))


def _span(rng, data):
    start = _place(rng, data)
    return start, start + int(rng.integers(1, 40))


def _flip(rng, data):
    at = _place(rng, data)
    return data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :]


def _put(rng, data):
    at = _place(rng, data)
    return data[:at] + rng.bytes(1) + data[at + 1 :]


def _put_extreme(rng, data):
    at, number = _place(rng, data), EXTREMES[rng.integers(len(EXTREMES))]
    width = (1, 2, 4, 8)[rng.integers(4)]
    return data[:at] + struct.pack("<Q", number)[:width] + data[at + width :]


def _delete(rng, data):
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _repeat(rng, data):
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def _insert(rng, data):
    at = _place(rng, data)
    return data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:]


def _move(rng, data):
    start, end = _span(rng, data)
    rest = data[:start] + data[end:] or b"\0"
    at = _place(rng, rest)
    return rest[:at] + data[start:end] + rest[at:]


def _cut(rng, data):
    return data[: _place(rng, data)]


FAULTS = (_flip, _flip, _put, _put_extreme, _put_extreme, _delete, _repeat, _insert, _move, _cut)


def mutate_json(rng: np.random.Generator, content: dict) -> dict:
    """`content` with one setting, at any depth, replaced, removed, or a new one beside it."""
    content = dict(content)
    name = list(content)[rng.integers(len(content))]
    if isinstance(content[name], dict) and content[name] and rng.random() < 0.8:
        return content | {name: mutate_json(rng, content[name])}
    value = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    match rng.integers(4):
        case 0:
            del content[name]
            return content
        case 1:
            return content | {f"{name}_{rng.integers(3)}": value}
        case _:
            return content | {name: value}


@contextlib.contextmanager
def bounded():
    """Fails if one file takes SECONDS, or all together GROWTH; yields a call for each file."""
    slowest, began = 0.0, time.process_time()

    def next_file():
        nonlocal slowest, began
        now = time.process_time()
        slowest = max(slowest, now - began)
        began = now

    before = _peak_memory()
    yield next_file
    next_file()
    grown = _peak_memory() - before
    print(f"slowest file: {1000 * slowest:.0f} ms; memory: {grown / 1e6:.0f} MB")
    assert slowest < SECONDS
    assert grown < GROWTH


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
