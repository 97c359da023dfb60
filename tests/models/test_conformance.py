"""Every family in models/ passes the kit that strangers' are held to, in every container."""

from __future__ import annotations

from porttool_camel5b.conformance import Camel5bConformance
from porttool_gpt2.conformance import GPT2Conformance
from porttool_gpt_next.conformance import NemoConformance
from porttool_santacoder.conformance import (
    BigCodeConformance,
    SantaCoderConformance,
    StarCoderConformance,
)
from source_cases import GPT2B, CompressedNemo, FasterTransformer, Megatron, MegatronRanks, OpenAI


class TestGPT2(GPT2Conformance):
    pass


class TestMegatron(Megatron):
    pass


class TestMegatronRanks(MegatronRanks):
    pass


class TestOpenAI(OpenAI):
    pass


class TestFasterTransformer(FasterTransformer):
    pass


class TestCamel5b(Camel5bConformance):
    pass


class TestBigCode(BigCodeConformance):
    pass


class TestStarCoder(StarCoderConformance):
    pass


class TestSantaCoder(SantaCoderConformance):
    pass


class TestGPTNext(NemoConformance):
    pass


class TestGPT2B(GPT2B):
    pass


class TestCompressedGPTNext(CompressedNemo):
    pass
