"""The one shape that every plugin class has."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from porttool.errors import UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_PROBLEMS = 10
"""Problems of one input that are told; a damaged one may have thousands."""
UNKNOWN = "extra_forbidden"
"""What pydantic calls a name that a closed model does not have."""


class Options(BaseModel):
    """Options of a component: closed, frozen, finite, settable as `--set NAME VALUE`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


PathOption = Annotated[Path, AfterValidator(Path.absolute)]
"""A path as an option: kept absolute, for manifests record options and are read elsewhere."""


class Component(ABC):
    """A named thing that a plugin provides; what it can be told is its `Options`.

    `name` is unique among the components of a kind. A subclass that can be told something sets
    `Options` to its own class, and annotates `options` with it.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = self.parse(options or {})

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> BaseModel:
        """Validate options; an unknown name or a bad value is a UsageError naming it."""
        try:
            return cls.Options.model_validate(dict(options))
        except ValidationError as error:
            known = ""
            if any(problem["type"] == UNKNOWN for problem in error.errors()):
                known = f"; its options are: {', '.join(cls.Options.model_fields) or 'none'}"
            raise UsageError(f"bad option for {cls.name!r}: {explain(error)}{known}") from error


def explain(error: ValidationError) -> str:
    """Return a validation error as one line: field, what is wrong with it, what it was."""
    return "; ".join(explain_one(problem) for problem in error.errors()[:MAX_PROBLEMS])


def explain_one(problem: ErrorDetails) -> str:
    """Say one problem in plain words; a whole object, of which a field is wrong, is not shown."""
    field = f"{'.'.join(map(str, problem['loc'])):.200}"
    if problem["type"] == UNKNOWN:
        return f"{field} is unknown"
    if problem["type"] in ("tuple_type", "list_type") and isinstance(problem["input"], str):
        return f"""{field}: should be a list, as '["a", "b"]' (got {problem["input"]!r:.80})"""
    said = f"{problem['msg'].removeprefix('Value error, '):.200}"
    given = problem["input"]
    shown = "" if isinstance(given, dict | BaseModel) else f" (got {given!r:.80})"
    return f"{field}: {said}{shown}" if field else f"{said}{shown}"
