"""Random bits as a function of a counter, the same on every device: SplitMix64, G. Steele et al., OOPSLA 2014.

torch multiplies no unsigned integers, so the 64 bits are those of an int64.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Bits = TypeVar("Bits", int, Tensor)


def signed(value: int) -> int:
    """The last 64 bits of an integer as a signed number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


INCREMENT = signed(0x9E3779B97F4A7C15)


def mix(z: Bits) -> Bits:
    """The output function (D. Stafford's mix 13) of int64 of any shape; of a Python integer the last 64 bits count."""
    z = (z ^ shift_right(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift_right(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ shift_right(z, 31)


def shift_right(z: Bits, bits: int) -> Bits:
    """Right shift that fills with zeros; torch's own repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
