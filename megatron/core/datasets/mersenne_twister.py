"""The 64-bit Mersenne Twister with numpy, in bulk: numpy itself has the 32-bit one only.

Nishimura, "Tables of 64-bit Mersenne Twisters", ACM TOMACS 10(4), 2000; the parameters and the seeding are those of
`std::mt19937_64`, with which sample indices of masked datasets are shuffled.
"""

from __future__ import annotations

import numpy

_STATE, _MIDDLE = 312, 156
_LOWER = numpy.uint64((1 << 31) - 1)
_UPPER = ~_LOWER
_TWIST = numpy.uint64(0xB5026F5AA96619E9)
_MASK = (1 << 64) - 1


def mt19937_64(seed: int, count: int) -> numpy.ndarray:
    """The first `count` outputs, [count] uint64, of a generator seeded with `seed` (taken modulo 2^64)."""
    state = _seeded(seed)
    blocks = []
    for _ in range(-(-count // _STATE)):
        _advance(state)
        blocks.append(_tempered(state))
    return numpy.concatenate(blocks)[:count] if blocks else numpy.empty(0, numpy.uint64)


def _seeded(seed: int) -> numpy.ndarray:
    values = [seed & _MASK]
    for i in range(1, _STATE):
        values.append((6364136223846793005 * (values[-1] ^ (values[-1] >> 62)) + i) & _MASK)
    return numpy.array(values, dtype=numpy.uint64)


def _advance(state: numpy.ndarray) -> None:
    """Replace the state by the next one. The second half needs the new values of the first, the last one the first."""
    first = state[_MIDDLE:] ^ _twisted(state[:_MIDDLE], state[1 : _MIDDLE + 1])
    state[:_MIDDLE] = first
    second = state[: _MIDDLE - 1] ^ _twisted(state[_MIDDLE:-1], state[_MIDDLE + 1 :])
    last = state[_MIDDLE - 1] ^ _twisted(state[-1:], state[:1])[0]
    state[_MIDDLE:-1] = second
    state[-1] = last


def _twisted(this: numpy.ndarray, following: numpy.ndarray) -> numpy.ndarray:
    x = (this & _UPPER) | (following & _LOWER)
    return (x >> numpy.uint64(1)) ^ numpy.where(x & numpy.uint64(1), _TWIST, numpy.uint64(0))


def _tempered(state: numpy.ndarray) -> numpy.ndarray:
    x = state ^ ((state >> numpy.uint64(29)) & numpy.uint64(0x5555555555555555))
    x ^= (x << numpy.uint64(17)) & numpy.uint64(0x71D67FFFEDA60000)
    x ^= (x << numpy.uint64(37)) & numpy.uint64(0xFFF7EEE000000000)
    return x ^ (x >> numpy.uint64(43))
