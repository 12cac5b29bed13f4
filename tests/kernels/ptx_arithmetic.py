"""Arithmetic of PTX on NumPy arrays, for ptx.py."""

import operator

import numpy as np

WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}  # bits -> bytes


def dtype_of(name):
    return {"u": "u", "s": "i", "f": "f", "b": "u"}[name[0]] + str(WIDTH[name[1:]])


def from_bfloat16(x):
    return (x.astype("u4") << np.uint32(16)).view("f4")


def to_bfloat16(x):
    """To the nearest, to even numbers between two."""
    bits = x.view("u4").astype("u8")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("u2")
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def lane_of_shuffle(kind, lane, by, clamp):
    """The lane of a warp whose number each lane gets."""
    segment, bound = clamp >> 8 & 31, clamp & 31
    last = lane & segment | bound & ~segment
    if kind == "up":
        other, inside = lane - by, lane - by >= last
    elif kind == "down":
        other, inside = lane + by, lane + by <= last
    elif kind == "bfly":
        other, inside = lane ^ by, (lane ^ by) <= last
    else:
        other = lane & segment | by & ~segment
        inside = other <= last
    return np.where(inside, other, lane)


def _flushed(x):
    """Without subnormal numbers."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _shifted(shift):
    return lambda a, n: np.where(n < 8 * a.itemsize, shift(a, n.astype(a.dtype)), a.dtype.type(0))


def _wide(a, b):
    wide = f"{a.dtype.kind}{2 * a.itemsize}"
    return a.astype(wide) * b.astype(wide)


def _high(a, b):
    return (_wide(a, b) >> _wide(a, b).dtype.type(8 * a.itemsize)).astype(a.dtype)


OF_FLOATS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
    "fma": lambda a, b, c: (a.astype("f8") * b + c).astype("f4"),
    "ex2": lambda x: _flushed(np.exp2(_flushed(x).astype("f8")).astype("f4")),
    "rcp": lambda x: _flushed((1 / _flushed(x).astype("f8")).astype("f4")),
}
OF_INTEGERS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mul.hi": _high,
    "mul.wide": _wide,
    "mad.lo": lambda a, b, c: a * b + c,
    "neg": operator.neg,
    "min": np.minimum,
    "max": np.maximum,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "shl": _shifted(operator.lshift),
    "shr": _shifted(operator.rshift),
    "bfe": lambda a, at, n: a >> at & (a.dtype.type(1) << n) - a.dtype.type(1),
}
