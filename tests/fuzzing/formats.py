"""Changes that know a container's structure: what they leave alone still fits together."""

from __future__ import annotations

import ast
import io
import json
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from random import Random

import yaml

import tf_bundle_writer as tf
from fuzzing.mutate import NUMBERS, mutate_bytes, mutate_pickle, mutate_tree, operations
from porttool.sources.tf_bundle import read_table, take_varints

BAD_NAMES = (
    "../evil", "/tmp/evil", "a/../../evil", "a\\evil", "", ".", "..", "./", "x" * 300, "evil\0x",
    "\N{SNOWMAN}", "model_config.yaml", "model_weights.ckpt", "mp_rank_00/model_weights.ckpt",
)  # fmt: skip
PAX = {
    "path": ("../evil", "/evil", "x" * 900), "size": ("-1", "1e9", "99999999999999999999", "12"),
    "linkpath": ("/etc/passwd",), "mtime": ("nan", "1e400"), "uid": ("x",),
    "GNU.sparse.map": ("0,1", "0,1,2", "x"), "GNU.sparse.size": ("99999999999", "-1"),
    "GNU.sparse.major": ("1",), "GNU.sparse.minor": ("0",), "GNU.sparse.name": ("../evil",),
    "GNU.sparse.numblocks": ("99999999",), "hdrcharset": ("BINARY", "utf-99"),
}  # fmt: skip


def mutate_safetensors(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change the header as JSON, keeping its length right or not."""
    length = struct.unpack("<Q", data[:8])[0]
    tree, said = mutate_tree(rng, json.loads(data[8 : 8 + length]))
    header = json.dumps(tree).encode()
    claimed = len(header) if rng.random() < 0.8 else rng.choice(NUMBERS) % (1 << 64)
    return struct.pack("<Q", claimed) + header + data[8 + length :], f"header {said}"


def mutate_values(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change some float32 weights to numbers that are none, or that few would expect."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    changed, n = bytearray(data), rng.choice((1, 1, 8, 200))
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 1.0))
    for _ in range(n):
        struct.pack_into("<f", changed, start + 4 * rng.randrange((len(data) - start) // 4), value)
    return bytes(changed), f"{n} values {value}"


def mutate_zip(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change a torch zip's records, or the table at its end."""
    if rng.random() < 0.2:
        end = rng.randrange(len(data) // 2, len(data))
        tail, said = mutate_bytes(rng, data[end:])
        return data[:end] + tail, f"zip's end: {said}"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(entries))
    name, content = entries[at]
    said, kind = f"record {name}", zipfile.ZIP_STORED
    match rng.randrange(10):
        case 0:
            del entries[at]
            said += " left out"
        case 1:
            entries.append((name, rng.choice(entries)[1]))
            said += " twice"
        case 2:
            entries[at] = (rng.choice((*BAD_NAMES, f"{name}x", "archive/data.pkl")), content)
            said += f" called {entries[at][0]!r:.30}"
        case 3:
            kind = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            said += " compressed"
        case 4:
            entries[at] = (name, mutate_bytes(rng, content)[0])
            said += " changed"
        case _:
            at = next(i for i, (n, _) in enumerate(entries) if n.endswith("data.pkl"))
            changed, said = mutate_pickle(rng, entries[at][1])
            entries[at] = (entries[at][0], changed)
    return write_zip(entries, name if kind != zipfile.ZIP_STORED else None, kind), said


def write_zip(entries: list[tuple[str, bytes]], packed: str | None, kind: int) -> bytes:
    out = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore"),  # a name may be there twice
        zipfile.ZipFile(out, "w", allowZip64=True) as archive,
    ):
        for name, content in entries:
            info = zipfile.ZipInfo(name.replace("\0", "") or "empty")
            info.compress_type = kind if name == packed else zipfile.ZIP_STORED
            archive.writestr(info, content)
    return out.getvalue()


def mutate_legacy(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change one of the five pickles of torch's old format, or what follows them."""
    parts, rest = [], data
    for _ in range(5):
        parts.append(b"".join(operations(rest)))
        rest = rest[len(parts[-1]) :]
    at = rng.choice((0, 1, 2, 3, 3, 3, 3, 4, 5))
    if at == 5:
        rest, said = mutate_bytes(rng, rest)
    else:
        parts[at], said = mutate_pickle(rng, parts[at])
    return b"".join(parts) + rest, f"part {at}: {said}"


def mutate_tar(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change members of an archive: names, kinds, sizes, extended headers, contents."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(i, (archive.extractfile(i) or io.BytesIO()).read()) for i in archive]
    at = rng.randrange(len(members))
    info, content = members[at]
    match rng.randrange(9):
        case 0:
            info.name = rng.choice(BAD_NAMES)
        case 1:
            info.type = rng.choice((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"L", b"K",
                                    b"x", b"g", b"D", b"V", b"\0", b"Z"))  # fmt: skip
            info.linkname = rng.choice(("/etc/passwd", "model_config.yaml", ""))
        case 2:
            info.size = rng.choice((*NUMBERS, info.size + 1, info.size * 2, 1 << 66))
        case 3:
            key = rng.choice(list(PAX))
            info.pax_headers = {key: rng.choice(PAX[key]), "comment": "x" * rng.choice((1, 9000))}
        case 4:
            members.insert(rng.randrange(len(members) + 1), (info, content))
        case 5:
            del members[at]
        case 6:
            members.insert(at, rng.choice(members))
        case _:
            members[at] = (info, mutate_member(rng, info.name, content))
    text = f"member {info.name!r:.30} {info.type!r} {info.size}"
    return write_tar(members), text


def mutate_member(rng: Random, name: str, content: bytes) -> bytes:
    """Change what is in a member."""
    if name.endswith(".yaml") and rng.random() < 0.8:
        tree, _ = mutate_tree(rng, yaml.safe_load(content))
        return yaml.safe_dump(tree, allow_unicode=False).encode()
    if name.endswith(".ckpt"):
        return mutate_zip(rng, content)[0]
    return mutate_bytes(rng, content)[0]


def write_tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Write headers as they are, even where they lie about the contents."""
    out = bytearray()
    for info, content in members:
        style = tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT
        if info.pax_headers or info.isfile():
            info.size = info.size or len(content)
        try:
            out += info.tobuf(style, errors="surrogateescape")
        except (ValueError, OverflowError):
            out += tarfile.TarInfo("unwritable").tobuf()
        out += content + bytes(-len(content) % tarfile.BLOCKSIZE)
    return bytes(out) + bytes(2 * tarfile.BLOCKSIZE)


def mutate_bundle(rng: Random, index: Path) -> str:
    """Change an entry of TensorFlow's index and make every checksum right again."""
    entries = list(read_table(index))
    at = rng.randrange(len(entries))
    key, value = entries[at]
    match rng.randrange(8):
        case 0:
            del entries[at]
            said = "left out"
        case 1:
            entries.append((key + b"2", value))
            said = "copied"
        case 2:
            entries[at] = (rng.choice((b"", b"\xff", b"model/wte", key[:-1])), value)
            said = "renamed"
        case 3:
            entries[at] = (key, mutate_bytes(rng, value)[0])
            said = "bytes"
        case _:
            entries[at] = (key, mutate_message(rng, value))
            said = "field"
    index.write_bytes(tf.table(entries, rng.choice((1, 7, 100))))
    return f"entry {key[:30]!r} {said}"


def mutate_message(rng: Random, data: bytes) -> bytes:
    """Change one field of a protocol buffer, or of one nested in it."""
    fields: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        (tag,), at = take_varints(data, 1, at)
        start = at
        match tag & 7:
            case 0:
                _, at = take_varints(data, 1, at)
            case 2:
                (length,), start = take_varints(data, 1, at)
                at = start + length
            case _:
                at += 4
        fields.append((tag, data[start:at]))
    if not fields:
        return tf.field(rng.randrange(1, 9), rng.choice(NUMBERS) % (1 << 64))
    pick = rng.randrange(len(fields))
    tag, content = fields[pick]
    if tag & 7 == 2:
        fields[pick] = (tag, mutate_message(rng, content) if rng.random() < 0.8 else content[1:])
    elif rng.random() < 0.2:
        fields[pick] = (rng.randrange(1, 9) << 3, content)
    elif tag & 7 == 0:
        fields[pick] = (tag, tf.varint(rng.choice(NUMBERS) % (1 << 70)))
    else:
        fields[pick] = (tag, mutate_bytes(rng, content)[0][:4].ljust(4, b"\0"))
    return b"".join(
        tf.varint(tag) + (tf.varint(len(content)) if tag & 7 == 2 else b"") + content
        for tag, content in fields
    )


def mutate_npy(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change the header of an array."""
    length = struct.unpack("<H", data[8:10])[0]
    header = ast.literal_eval(data[10 : 10 + length].decode("latin-1"))
    key = rng.choice(("shape", "shape", "descr", "fortran_order"))
    shape = list(header["shape"])
    shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
    header[key] = rng.choice({
        "shape": (tuple(shape), (), (1 << 62, 0), (1 << 40,) * 9, (1,) * 65, "x", (None,), (True,),
                  tuple(header["shape"][::-1])),
        "descr": ("|O", "|V99", "<f2", ">f4", "<f8", "<i8", "<U4", "<c16", "<M8[s]", "x", "", None,
                  [("a", "<f4")], [("a", "|O")], "<f4,<f4", ("<f4", (1 << 40,)), "<V0", "|S0"),
        "fortran_order": (True, 1, None, "x"),
    }[key])  # fmt: skip
    text = repr(header).encode().ljust(length - 1) + b"\n"
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return data[:6] + version + size + text + data[10 + length :], f"{key} {header[key]!r:.40}"


INI_VALUES = (
    "", "None", "True", "-1", "0", "1e9", "1000000000", "99999999999999999999", "1.5", "nan", "inf",
    "%(n_embd)s", "%", "[1, 2]", "{'a': 1}", "'x'", "b'x'", "(" * 3000, "[" * 90, "0x" + "f" * 2000,
    "9" * 5000, "1_000", "lambda: 0", "__import__('os').system('true')", "\N{SNOWMAN}", "swiglu",
    "relu", "fp16", "int8", "-" * 5000 + "1", "1" + "+1j" * 2000, "2",
)  # fmt: skip


def mutate_ini(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change lines of config.ini; values in the second section are JSON."""
    lines = data.decode().splitlines()
    at = rng.choice([i for i, line in enumerate(lines) if line])
    key, equals, value = lines[at].partition(" = ")
    said = f"line {lines[at][:30]!r}"
    match rng.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, rng.choice(lines))
        case 2:
            lines[at] = key
        case 3:
            lines[at] = f"{key}2{equals}{value}"
        case 4 if value.startswith("{"):
            tree, said = mutate_tree(rng, json.loads(value))
            lines[at] = f"{key} = {json.dumps(tree)}"
        case 5:
            lines = lines[: lines.index("[porttool]")] if "[porttool]" in lines else lines[at:]
        case _:
            lines[at] = f"{key} = {rng.choice(INI_VALUES)}"
    return "\n".join(lines).encode(errors="surrogatepass"), said
