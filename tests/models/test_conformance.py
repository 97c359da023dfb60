"""Every family in models/ passes the kit that strangers' families are held to."""

from __future__ import annotations

import tarfile

from porttool_camel5b.conformance import Camel5bConformance
from porttool_gpt2.conformance import GPT2Conformance
from porttool_gpt_next.conformance import NemoConformance
from porttool_santacoder.conformance import BigCodeConformance, SantaCoderConformance


class TestGPT2(GPT2Conformance):
    pass


class TestCamel5b(Camel5bConformance):
    pass


class TestBigCode(BigCodeConformance):
    pass


class TestSantaCoder(SantaCoderConformance):
    pass


class TestGPTNext(NemoConformance):
    pass


class TestCompressedGPTNext(NemoConformance):
    """One file that is unpacked before it can be read."""

    def write_source(self, path, seed):
        folder = path.with_name("unpacked")
        super().write_source(folder, seed)
        pack(folder, path)

    def add_config_key(self, path, key):
        folder = path.with_name("unpacked")
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        super().add_config_key(folder, key)
        pack(folder, path)


def pack(folder, path):
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
