"""CRC-32C (Castagnoli, reflected polynomial 0x82F63B78, RFC 3720 B.4), fast on whole tensors.

A CRC register is linear over GF(2): feeding n zero bytes to it is a linear map. A buffer of 32-bit
words is folded onto its second half by feeding its first half the zero bytes that lie between the
two, all words at once through two tables of 65536 entries, until one word is left.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[Any]

POLYNOMIAL = 0x82F63B78
MASK = 0xFFFFFFFF
CHUNK_BITS = 16
"""Chunks of 2 ** 16 words, a quarter of a megabyte, stay in a processor's cache."""


def crc32c(data: bytes | memoryview | Words) -> int:
    """Return the CRC-32C of bytes."""
    import numpy as np

    view = np.frombuffer(data, np.uint8)
    whole = len(view) // 4
    words = view[: whole * 4].view("<u4")
    state = MASK
    for start in range(0, whole, 1 << CHUNK_BITS):
        state = fold(words[start : start + (1 << CHUNK_BITS)], state)
    for byte in view[whole * 4 :].tolist():
        state = zero_byte((state ^ byte) & 0xFF) ^ (state >> 8)
    return state ^ MASK


def fold(words: Words, state: int) -> int:
    """Feed words to a register in a given state; return its state after them."""
    import numpy as np

    bits = max((len(words) - 1).bit_length(), 0)
    buffer = np.zeros(1 << bits, np.uint32)  # leading zeros change nothing in an empty register
    buffer[len(buffer) - len(words) :] = words
    buffer[len(buffer) - len(words)] ^= np.uint32(state)
    for bit in reversed(range(bits)):
        half = 1 << bit
        low, high = shift_tables(bit)
        first = buffer[:half]
        buffer = buffer[half:]
        buffer ^= low[first & np.uint32(0xFFFF)]
        buffer ^= high[first >> np.uint32(16)]
    low, high = shift_tables(0)
    return int(low[buffer[0] & 0xFFFF] ^ high[buffer[0] >> 16])


@cache
def shift_tables(log_words: int) -> tuple[Words, Words]:
    """Return the map of feeding 2 ** log_words zero words, for a register's low and high half."""
    import numpy as np

    tables = []
    columns = shift_columns(log_words)
    for half in (columns[:16], columns[16:]):
        table = np.zeros(1, np.uint32)
        for column in half:
            table = np.concatenate([table, table ^ np.uint32(column)])
        tables.append(table)
    return tables[0], tables[1]


@cache
def shift_columns(log_words: int) -> tuple[int, ...]:
    """Return what each of a register's 32 bits becomes after 2 ** log_words zero words."""
    if log_words == 0:
        columns = [1 << bit for bit in range(32)]
        for _ in range(4):
            columns = [zero_byte(c & 0xFF) ^ (c >> 8) for c in columns]
        return tuple(columns)
    half = shift_columns(log_words - 1)
    return tuple(apply(half, column) for column in half)


def apply(columns: tuple[int, ...], value: int) -> int:
    """Multiply a matrix over GF(2), given by its columns, with a vector of bits."""
    result = 0
    for bit, column in enumerate(columns):
        if value >> bit & 1:
            result ^= column
    return result


@cache
def zero_byte(value: int) -> int:
    """Return the register after one zero byte, from a register that holds one byte."""
    for _ in range(8):
        value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
    return value


def masked(crc: int) -> int:
    """Return the form in which LevelDB's and TensorFlow's files store a CRC of CRCs."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & MASK
