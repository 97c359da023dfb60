"""Fetching a source from the hub. A local path always works without it."""

from __future__ import annotations

from pathlib import Path

from porttool.errors import SourceError, UsageError, importing, require_extra
from porttool.huggingface import WEIGHTS
from porttool.standing import kind_of, require_text_name

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
        require_text_name(Path(wanted))
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
    """Return true for `owner/name` or `owner/name@revision` that cannot be a path by mistake."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def fetch(hub_id: str) -> Path:
    """Download a repository's weights, configs and tokenizer into the hub's cache.

    Behind an `@` the id may name a branch, a tag or a commit.
    """
    require_extra("hub", "huggingface_hub")
    with importing("hub", "huggingface_hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    name, _, told = hub_id.partition("@")
    revision = told or None
    try:
        spare = unneeded(name, revision)
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(PATTERNS), ignore_patterns=spare
            )
        )
    except HFValidationError as error:  # more likely a path that is mistyped
        raise UsageError(
            f"{hub_id} does not exist, and nothing on the hub has such a name"
        ) from error
    except hub_errors() as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = (
            "run it again where there is a connection, what was fetched is kept; or fetch it "
            "otherwise and pass the folder's path"
        )
        if isinstance(error, RepositoryNotFoundError):
            cure = "if the name is right, it is private: log in with `hf auth login`"
        if isinstance(error, RevisionNotFoundError):
            cure = f"{revision!r} is no branch, tag or commit of it"
        if isinstance(error, GatedRepoError):  # which is one of the former, too
            cure = "accept its terms on its page there, and log in with `hf auth login`"
        raise SourceError(
            f"{hub_id}: not a local path, and the hub does not give it ({reason}); {cure}"
        ) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's library raises: its client's own errors pass through it, too."""
    from huggingface_hub.errors import HfHubHTTPError

    client = (error for error in HfHubHTTPError.__mro__ if error.__name__ == "HTTPError")
    return (OSError, *(error for error in client if issubclass(error, Exception)))


def unneeded(hub_id: str, revision: str | None) -> list[str]:
    """Return patterns of a repository's files that would not be read, of weights above all.

    Many hold the same weights twice.
    """
    below = "*/*"
    names = files_of(hub_id, revision)
    weights = next((name for name in WEIGHTS if name in names), None)
    if weights:
        return [below, "*.nemo", "*.bin" if ".safetensors" in weights else "*.safetensors"]
    archives = sorted(name for name in names if name.endswith(".nemo"))
    if len(archives) > 1:
        raise UsageError(
            f"{hub_id}: holds several archives ({', '.join(archives)}); fetch one of them and pass "
            f"its path: hf download {hub_id} {archives[0]}"
        )
    return [below]


def files_of(hub_id: str, revision: str | None) -> set[str]:
    """Return the names of a repository's files; where the hub is out of reach, of those fetched."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        found = HfApi().model_info(hub_id, revision=revision)
        return {file.rfilename for file in found.siblings or ()}
    except hub_errors():
        config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
        return (
            {file.name for file in Path(config).parent.iterdir()}
            if isinstance(config, str)
            else set()
        )
