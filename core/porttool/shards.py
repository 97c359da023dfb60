"""Writing safetensors files tensor by tensor: prepared ahead, hashed beside, never held whole."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from porttool.config import ITEMSIZE, Dtype
from porttool.folder import JOURNAL, FileRecord, PendingFolder, sync
from porttool.memory import as_bytes
from porttool.progress import Progress
from porttool.sources.safetensors_file import CODES

if TYPE_CHECKING:
    from torch import Tensor

M_MMAP_THRESHOLD = -3
MAX_SHARD_BYTES = 1 << 29
"""A shard is the unit of resuming and of parallel verification."""

SIDE_BY_SIDE, SMALL_SHARD_BYTES = 16, 1 << 27
"""Weights are divided into so many files, at least, for as many threads to hash: into fewer where
files of so many bytes would do."""


@dataclass(frozen=True)
class TensorJob:
    """One tensor to write: what it will be, what is read to make it, and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    n_read: int
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def cost(self) -> int:
        """Memory that its making may take: the larger of source and result, and a copy of it."""
        return 2 * max(self.n_read, self.nbytes)


def plan_shards(
    jobs: Sequence[TensorJob], stem: str, max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[TensorJob]]:
    """Divide jobs, in order, into files of at most max_bytes, or of one tensor: name → jobs."""
    shards: list[list[TensorJob]] = [[]]
    size = 0
    each = sum(job.nbytes for job in jobs) // SIDE_BY_SIDE
    most = min(max_bytes, max(each, SMALL_SHARD_BYTES))
    for job in jobs:
        if shards[-1] and size + job.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    n = len(shards)
    return {f"{stem}-{i + 1:05}-of-{n:05}.safetensors": shard for i, shard in enumerate(shards)}


def work_key(manifest: str, shards: Mapping[str, Sequence[TensorJob]]) -> str:
    """Say what work it is, for resuming: files of another division hold other tensors."""
    division = [len(shard) for shard in shards.values()]
    return hashlib.sha256(f"{manifest}{division}".encode()).hexdigest()


def encode_header(jobs: Sequence[TensorJob], metadata: Mapping[str, str]) -> bytes:
    """Return the length prefix and the header, padded so that the data is aligned to 64 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for job in jobs:
        begin, end = end, end + job.nbytes
        entries[job.name] = {
            "dtype": CODES[job.dtype], "shape": list(job.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


def make_ahead(
    jobs: Iterable[TensorJob], *, workers: int, budget: int
) -> Generator[tuple[TensorJob, Tensor]]:
    """Make tensors on `workers` threads, in order, with at most `budget` bytes under way.

    A single tensor may exceed the budget; it is then the only one under way.
    """
    waiting: deque[tuple[TensorJob, Future[Tensor]]] = deque()
    queue = deque(jobs)
    with ThreadPoolExecutor(workers) as pool:
        spent = 0
        try:
            while queue or waiting:
                while queue and (not waiting or spent + queue[0].cost <= budget):
                    job = queue.popleft()
                    waiting.append((job, pool.submit(job.make)))
                    spent += job.cost
                job, future = waiting.popleft()
                yield job, future.result()
                del future
                spent -= job.cost
        finally:
            pool.shutdown(cancel_futures=True)


def write_shards(
    folder: PendingFolder,
    shards: Mapping[str, Sequence[TensorJob]],
    *,
    workers: int,
    progress: Progress,
) -> None:
    """Write every shard that the folder does not hold yet."""
    give_memory_back()
    todo = {name: jobs for name, jobs in shards.items() if name not in folder.files}
    jobs = [job for shard in todo.values() for job in shard]
    budget = max((job.cost for job in jobs), default=0)
    progress.advance(sum(j.nbytes for n, s in shards.items() if n not in todo for j in s))
    ahead = make_ahead(jobs, workers=workers, budget=budget)
    with one_thread_each(), closing(ahead) as tensors, ThreadPoolExecutor(1) as disk:
        completed: list[Future[None]] = []
        for name, shard in todo.items():
            with (folder.path / name).open("wb", buffering=0) as file:
                record = write_tensors(file, shard, tensors, progress)
            for earlier in completed:
                earlier.result()
            completed = [disk.submit(complete, folder, name, record)]
        for last in completed:
            last.result()


def write_files(place: Path, jobs: Sequence[TensorJob], *, progress: Progress) -> None:
    """Write tensors into part of a pending folder, which is made anew when it is resumed."""
    shards = plan_shards(jobs, "model")
    write_shards(PendingFolder(place, place), shards, workers=2, progress=progress)
    (place / JOURNAL).unlink()


def complete(folder: PendingFolder, name: str, record: FileRecord) -> None:
    """Push a shard to the disk, while the next one is made, and only then note it as complete."""
    with (folder.path / name).open("rb") as file:
        sync(file)
    folder.add_file(name, record)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep torch from starting threads for each of the threads that make tensors."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def give_memory_back() -> None:
    """Let the C library return freed tensors to the system at once.

    glibc keeps blocks of up to 32 MB, for each thread, from the first time that one is freed.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 22)


def write_tensors(
    file: IO[bytes],
    shard: Sequence[TensorJob],
    tensors: Iterator[tuple[TensorJob, Tensor]],
    progress: Progress,
) -> FileRecord:
    """Write a header and its tensors; hash each on a second thread while it is written."""
    digest = hashlib.sha256()
    header = encode_header(shard, {"format": "pt"})
    write_all(file, memoryview(header))
    digest.update(header)
    size = len(header)
    with ThreadPoolExecutor(1) as hasher:
        for _ in shard:
            job, tensor = next(tensors)
            data = as_bytes(tensor)
            hashed = hasher.submit(digest.update, data)
            write_all(file, data)
            hashed.result()
            size += len(data)
            progress.advance(job.nbytes)
            del tensor, data, hashed
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def write_all(file: IO[bytes], data: memoryview) -> None:
    """Write to an unbuffered file until everything is written."""
    while data:
        data = data[file.write(data[: 1 << 30]) :]
