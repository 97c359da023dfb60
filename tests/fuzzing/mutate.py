"""Seeded changes of bytes, of JSON-like trees and of pickles. Each says what it did."""

from __future__ import annotations

import copy
import io
import pickletools
import struct
from random import Random
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, -(1 << 31),
    (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 48, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
"""Where counters overflow, signs turn and sizes stop being possible."""

ODD: tuple[Any, ...] = (
    None, True, False, "", "x" * 5000, "../../secret", "/etc/passwd", "\0", "\ud800", "nan", "1e5",
    1.5, -0.0, 1e308, 1e-320, float("inf"), float("nan"), 10**30, -(10**30), 10**400, [], {}, [[]],
    [0] * 300, {"a": {"b": [1]}}, ["\N{SNOWMAN}"], *NUMBERS,
)  # fmt: skip
"""Values that nothing should expect."""

GLOBALS = (
    "os system", "posix system", "builtins eval", "builtins exec", "builtins getattr",
    "subprocess Popen", "torch load", "torch.storage _load_from_bytes", "torch Tensor",
    "torch Size", "torch device", "torch float32", "torch.nn.parameter Parameter",
    "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_nested_tensor", "torch FloatStorage", "torch DoubleStorage",
    "torch ByteStorage", "torch BoolStorage", "torch ComplexDoubleStorage", "torch QInt8Storage",
    "torch.storage UntypedStorage", "torch.storage TypedStorage", "collections OrderedDict",
    "collections Counter", "_codecs encode", "builtins bytearray", "builtins set",
    "torch.serialization _get_layout", "numpy.core.multiarray _reconstruct", "numpy dtype",
    "argparse Namespace", "megatron.model Thing", "porttool_nowhere Thing",
)  # fmt: skip
"""What a pickle may ask for: code, torch's own functions, and what is nowhere."""

OPCODES = (
    b"0", b"1", b"2", b"(", b"t", b"l", b"d", b"}", b"]", b")", b"N", b"\x88", b"\x89", b"R", b"b",
    b"s", b"u", b"a", b"e", b"o", b"Q", b"q\x00", b"h\x00", b"h\xff", b"\x85", b"\x86", b"\x87",
    b".", b"K\x00", b"J\xff\xff\xff\xff", b"\x94", b"\x90", b"\x91", b"\x81", b"\x92", b"\x93",
    b"\x82\x01", b"\x95" + b"\xff" * 8, b"\x8d" + b"\xff" * 8, b"X\xff\xff\xff\x7f", b"I10\n",
    b"L99L\n", b"F1e999\n", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"\x8b\xff\xff\xff\x7f",
    b"c__main__\nx\n", b"ios\nsystem\n", b"P1\n", b"B\xff\xff\xff\x7f", b"\x97", b"\x80\x05",
)  # fmt: skip

RUNS = (b"[", b"{", b"(", b"\0", b"9", b"\xff", b"a", b" ", b"\n", b"&a [*a,")


def mutate_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change one to three places."""
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(CHANGES)
        data = change(rng, data)
        said.append(change.__name__)
    return data, "+".join(said)


def place(rng: Random, data: bytes) -> int:
    """A position, half of the time near an end, where most of a format's structure is."""
    if rng.random() < 0.5 or len(data) < 8:
        return rng.randrange(len(data) + 1)
    near = rng.randrange(min(len(data), 256))
    return near if rng.random() < 0.5 else len(data) - near


def flip_bit(rng: Random, data: bytes) -> bytes:
    if not data:
        return data
    at = min(place(rng, data), len(data) - 1)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def set_byte(rng: Random, data: bytes) -> bytes:
    at, value = place(rng, data), rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return data[:at] + bytes([value]) + data[at + 1 :]


def set_number(rng: Random, data: bytes) -> bytes:
    at, width = place(rng, data), rng.choice((2, 4, 8))
    value = rng.choice(NUMBERS) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def truncate(rng: Random, data: bytes) -> bytes:
    return data[: place(rng, data)]


def insert_random(rng: Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 64, 700))) + data[at:]


def insert_run(rng: Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + rng.choice(RUNS) * rng.choice((3, 50, 2000, 100_000)) + data[at:]


def delete_range(rng: Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 8, 64, 512)) :]


def duplicate_range(rng: Random, data: bytes) -> bytes:
    at, width = place(rng, data), rng.choice((1, 8, 64, 512, 3000))
    return data[: at + width] + data[at:]


def swap_ranges(rng: Random, data: bytes) -> bytes:
    a, b = sorted((place(rng, data), place(rng, data)))
    width = min(rng.choice((1, 8, 64)), b - a)
    first, second = data[a : a + width], data[b : b + width]
    return data[:a] + second + data[a + width : b] + first + data[b + width :]


def zero_range(rng: Random, data: bytes) -> bytes:
    at, width = place(rng, data), rng.choice((4, 16, 512))
    return data[:at] + bytes(len(data[at : at + width])) + data[at + width :]


CHANGES = (
    flip_bit, flip_bit, set_byte, set_number, set_number, truncate, insert_random, insert_run,
    delete_range, duplicate_range, swap_ranges, zero_range,
)  # fmt: skip


def mutate_tree(rng: Random, tree: Any) -> tuple[Any, str]:
    """Change one to three places of nested dictionaries and lists."""
    tree = copy.deepcopy(tree)
    said = [change_tree(rng, tree) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return tree, "+".join(said)


def slots(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    keys: Any = tree if isinstance(tree, dict) else ()
    keys = range(len(tree)) if isinstance(tree, list) else keys
    return [slot for key in keys for slot in ((tree, key), *slots(tree[key]))]


def change_tree(rng: Random, tree: Any) -> str:
    """Change one place in it."""
    found = slots(tree)
    if not found:
        return "nothing"
    holder, key = rng.choice(found)
    other, at = rng.choice(found)
    match rng.randrange(7):
        case 0 | 1:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        case 2 if isinstance(holder[key], int | float):
            holder[key] = rng.choice((holder[key] * 2, -holder[key], holder[key] + 1, *NUMBERS))
        case 3:
            del holder[key]
        case 4:
            holder[key] = copy.deepcopy(other[at])
        case 5 if isinstance(holder, dict):
            holder[rng.choice(("", "a", "__metadata__", f"{key}2", "x" * 3000))] = holder.pop(key)
        case _:
            holder[key] = copy.deepcopy(rng.choice(NUMBERS))
    return f"tree at {key!r:.40}"


def mutate_numbers(rng: Random, tree: Any) -> tuple[Any, str]:
    """Change one or two numbers, to others that may pass for what they stand for."""
    tree = copy.deepcopy(tree)
    numbers = [(h, k) for h, k in slots(tree) if type(h[k]) in (int, float)]
    said = []
    for holder, key in rng.sample(numbers, min(len(numbers), rng.choice((1, 2)))):
        value = holder[key]
        others = (value + 1, value * 2, value * 1000, value // 2, 1, 4096, 1 << 20, 1 << 24)
        holder[key] = rng.choice((*others, *NUMBERS))
        said.append(f"{key!r:.30} {value} to {holder[key]}")
    return tree, "+".join(said)


def operations(data: bytes) -> list[bytes]:
    """Split one pickle into its operations; what follows it is left out."""
    starts = [at for _, _, at in pickletools.genops(io.BytesIO(data))]
    ends = [*starts[1:], starts[-1] + 1]
    return [data[a:b] for a, b in zip(starts, ends, strict=True)]


def mutate_pickle(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change one to three operations of a pickle."""
    try:
        ops = operations(data)
    except (ValueError, IndexError, struct.error):
        return mutate_bytes(rng, data)
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(ops))
        said.append(change_operation(rng, ops, at))
        if not ops:
            break
    return b"".join(ops), "pickle: " + "+".join(said)


def change_operation(rng: Random, ops: list[bytes], at: int) -> str:
    """Change the operations at one place."""
    match rng.randrange(8):
        case 0:
            del ops[at]
            return "deleted"
        case 1:
            ops.insert(at, ops[at])
            return "doubled"
        case 2:
            other = rng.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
            return "swapped"
        case 3:
            ops.insert(at, rng.choice(OPCODES))
            return f"inserted {ops[at][:1]!r}"
        case 4 | 5:
            at = pick(rng, ops, b"c\x93", at)
            ops[at] = b"c" + b"\n".join(rng.choice(GLOBALS).encode().split(b" ")) + b"\n"
            return f"asks for {ops[at]!r}"
        case _:
            at = pick(rng, ops, b"JKM\x8aI", at)
            value = rng.choice(NUMBERS)
            ops[at] = b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
            return f"number {value}"


def pick(rng: Random, ops: list[bytes], kinds: bytes, otherwise: int) -> int:
    """The place of a random operation of some kinds."""
    found = [i for i, op in enumerate(ops) if op[:1] in [bytes([k]) for k in kinds]]
    return rng.choice(found) if found else otherwise
