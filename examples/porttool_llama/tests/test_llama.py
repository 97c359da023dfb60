"""Llama passes porttool's conformance kit."""

from porttool_llama.conformance import LlamaConformance, TiedLlamaConformance


class TestLlama(LlamaConformance):
    """Every check of the kit."""


class TestTiedLlama(TiedLlamaConformance):
    """Every check of the kit."""
