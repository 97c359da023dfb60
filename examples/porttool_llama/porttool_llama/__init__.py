"""Llama for porttool."""

from porttool import Converter, hookimpl

api_version = 1


@hookimpl
def porttool_converters() -> list[type[Converter]]:
    """Return the converter of this family."""
    from porttool_llama.converter import LlamaConverter

    return [LlamaConverter]
