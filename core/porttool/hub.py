"""Fetching a source from the hub. A local path always works without it."""

from __future__ import annotations

from pathlib import Path

from porttool.errors import MissingExtra, SourceError, UsageError
from porttool.standing import kind_of

PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.nemo", "*.jinja")
"""What a source can consist of: weights, configs and tokenizers, never code."""


def resolve_source(source: str | None, hub_id: str | None) -> Path:
    """Return the local folder or file of a source: a path, or a hub id that is then fetched."""
    if source == "":  # as a variable of the shell that is not set gives it
        raise UsageError("the name of a folder or hub id is empty: give one, or leave it out")
    wanted = source or hub_id
    if wanted is None:
        raise UsageError("this family has no source of its own; give the path of one")
    if Path(wanted).exists():
        if own := kind_of(Path(wanted)):
            raise UsageError(f"{wanted}: this is already {own} of porttool, not a source")
        return Path(wanted)
    if (index := Path(f"{wanted}.index")).is_file():
        return index  # TensorFlow names a checkpoint by the prefix of its files
    if not is_hub_id(wanted):
        hint = "" if "/" in wanted else f"; on the hub it would have an owner, as OWNER/{wanted}"
        raise UsageError(f"{wanted} does not exist{hint}")
    return fetch(wanted)


def is_hub_id(name: str) -> bool:
    """Return true for `owner/name` that cannot be a path by mistake."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def fetch(hub_id: str) -> Path:
    """Download a repository's weights, configs and tokenizer into the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise MissingExtra("hub", "huggingface_hub") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(PATTERNS)))
    except HFValidationError as error:  # more likely a path that is mistyped
        raise UsageError(
            f"{hub_id} does not exist, and nothing on the hub has such a name"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"{hub_id}: not a local path, and the hub does not give it ({reason}); "
            "fetch it where there is a connection and pass the folder's path"
        ) from error
