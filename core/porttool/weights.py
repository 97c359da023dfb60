"""Weight rules: which source tensors make a canonical tensor, and how. Strict both ways."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from porttool.config import ModelConfig
from porttool.errors import PluginError, SourceError, require_kind
from porttool.memory import packed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Via = Callable[[ModelConfig, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a source tensor before it is read; `file` is for messages."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str


class TensorSource(ABC):
    """Named tensors that can be read one at a time, in any order, from several threads."""

    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's name and what is known of it."""

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """Read one tensor into memory of its own."""


def as_is(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Take one tensor unchanged."""
    return tensors[0]


def transpose(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Turn one [in, out] matrix into [out, in]."""
    return tensors[0].t()


def concat(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors along their first dimension."""
    import torch

    return torch.cat(list(tensors))


def interleaved_qkv(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Turn rows ordered by key head (its queries, key, value) into q | k | v.

    Several tensors are tensor-parallel parts, each with whole key heads.
    """
    import torch

    group = config.n_head // config.n_kv_head
    heads = [t.reshape(-1, group + 2, config.head_dim, *t.shape[1:]) for t in tensors]
    query = [h[:, :group].flatten(0, 2) for h in heads]  # [heads * head_dim, ...] of each part
    key = [h[:, group].flatten(0, 1) for h in heads]
    value = [h[:, group + 1].flatten(0, 1) for h in heads]
    return torch.cat(query + key + value)


@dataclass(frozen=True)
class Take:
    """A rule: these source tensors, through `via`, make one canonical tensor."""

    names: tuple[str, ...]
    via: Via = field(default=as_is)

    def at(self, layer: str) -> Take:
        """Return the rule with `{i}` filled in."""
        return replace(self, names=tuple(n.replace("{i}", layer) for n in self.names))


def take(*names: str, via: Via = as_is) -> Take:
    """Write a rule; `{i}` in a name stands for the layer."""
    return Take(names, via)


@dataclass(frozen=True)
class WeightMap:
    """A family's table: canonical template → rule, and what to do with the rest.

    `unused` are source names (shell patterns) that carry no weights. `duplicates` maps a source
    name to the one that it must equal, as a stored copy of a tied head must.
    """

    rules: Mapping[str, Take]
    unused: tuple[str, ...] = ()
    duplicates: Mapping[str, str] = field(default_factory=dict)


_LAYER = re.compile(r"^layers\.(\d+)\.")


def template_of(name: str) -> tuple[str, str]:
    """Return a canonical name with `{i}` for its layer, and that layer, "" outside of all."""
    layer = _LAYER.match(name)
    return _LAYER.sub("layers.{i}.", name), layer[1] if layer else ""


def identity_rules(names: Iterable[str]) -> dict[str, Take]:
    """Return rules for tensors that are under canonical names already, as they are stored."""
    return {template: take(template) for template, _ in map(template_of, names)}


def resolve_rules(
    wanted: Iterable[str], weight_map: WeightMap, present: Mapping[str, TensorInfo]
) -> dict[str, Take]:
    """Match every canonical name with its rule and account for every source tensor.

    Raises SourceError naming missing source tensors and those that no rule knows.
    """
    require_kind(weight_map, WeightMap, "weight_map")
    places = {name: template_of(name) for name in wanted}
    templates = {template for template, _ in places.values()}
    if unruled := sorted(templates - weight_map.rules.keys()):
        idle = sorted(weight_map.rules.keys() - templates)
        close = get_close_matches(unruled[0], idle, n=1)
        hint = f"; there is one for {close[0]!r}, which no tensor has" if close else ""
        quoted = listing([repr(name) for name in unruled])
        raise SourceError(f"the family has no weight rule for {quoted}{hint}")
    resolved = {name: weight_map.rules[t].at(layer) for name, (t, layer) in places.items()}
    used = {n for rule in resolved.values() for n in rule.names}
    missing = sorted(used - present.keys())
    extra = sorted(
        n for n in present.keys() - used - weight_map.duplicates.keys()
        if not any(fnmatchcase(n, pattern) for pattern in weight_map.unused)
    )  # fmt: skip
    if missing:
        files = listing(sorted({info.file for info in present.values()}))
        over = f"; what nothing accounts for: {listing(extra)}" if extra else ""
        raise SourceError(
            f"tensors missing from the source: {listing(missing)} (read: {files}){over}"
        )
    if extra:
        where = {present[n].file for n in extra}
        raise SourceError(
            f"tensors that nothing accounts for in {listing(sorted(where))}: {listing(extra)}; "
            "the config and the weights disagree, or this is another family"
        )
    return resolved


def listing(names: Sequence[str], most: int = 6) -> str:
    """Return names as text, the first few and a count of the rest."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name:.200}" for name in names[:most]) + rest


def map_tensor(
    name: str, shape: tuple[int, ...], rule: Take, source: TensorSource, config: ModelConfig
) -> Tensor:
    """Read a rule's sources and make the canonical tensor; a wrong shape is a SourceError.

    A rule that fails in another way, or gives no tensor, is a PluginError.
    """
    import torch

    tensors = [source.load(n) for n in rule.names]
    made_of = describe(rule, source)
    try:
        result = rule.via(config, tensors)
    except (RuntimeError, ValueError, IndexError) as error:
        raise SourceError(f"{name} cannot be made of {made_of}: {error}") from error
    except Exception as error:
        raise PluginError(
            f"{name} cannot be made of {made_of}: {named(rule)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, torch.Tensor):
        raise PluginError(f"{name}: {named(rule)} gives a {type(result).__name__}, not a tensor")
    require_shape(name, shape, result, made_of)
    return result


def named(rule: Take) -> str:
    """Return what a rule's `via` is called and where it is, for messages."""
    via = rule.via
    return f"{getattr(via, '__module__', '')}.{getattr(via, '__qualname__', type(via).__name__)}"


def require_shape(name: str, shape: tuple[int, ...], result: Tensor, made_of: str) -> None:
    """Refuse a canonical tensor of another shape than the config gives it."""
    if tuple(result.shape) != shape:
        raise SourceError(
            f"{name} should be {list(shape)} but comes out as {list(result.shape)} "
            f"of {made_of}; the config and the weights disagree"
        )


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Mapping[str, Take],
    source: TensorSource,
    config: ModelConfig,
) -> None:
    """Work every rule out on tensors without memory: a wrong shape is told before any is read.

    A rule that needs values to say its shape, or fails, is left for when it has them.
    """
    import torch

    infos = source.infos()
    for name, rule in rules.items():
        found = [infos[n] for n in rule.names]
        metas = [torch.empty(i.shape, dtype=getattr(torch, i.dtype), device="meta") for i in found]
        made = None
        with suppress(Exception), joining_shapes():
            made = rule.via(config, metas)
        if isinstance(made, torch.Tensor):
            require_shape(name, shapes[name], made, describe(rule, source))


def joining_shapes() -> AbstractContextManager[Any]:
    """Return a context in which `torch.cat` of tensors without memory works out a shape alone.

    torch's own way there imports its compiler: a second, and 150 MB of resident memory.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        shape = list(tensors[0].shape)
        rests = {(*t.shape[:dim], *t.shape[dim:][1:]) for t in tensors}
        if len(rests) != 1:
            raise ValueError(f"tensors that differ in more than dimension {dim} cannot be joined")
        shape[dim] = sum(t.shape[dim] for t in tensors)
        return tensors[0].new_empty(shape)

    class Joining(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return (joined if func is torch.cat else func)(*args, **(kwargs or {}))

    return Joining()


def describe(rule: Take, source: TensorSource) -> str:
    """Return a rule's source tensors as text: name, shape and file."""
    infos = source.infos()
    return ", ".join(f"{n} {list(infos[n].shape)} in {infos[n].file}" for n in rule.names)


def cast(name: str, tensor: Tensor, dtype: str, *, allow_nonfinite: bool = False) -> Tensor:
    """Convert to a contiguous tensor of `dtype`; refuse NaN, infinity and overflow by name.

    `allow_nonfinite` lets NaN and infinity of the tensor itself through.
    """
    import torch

    result = laid_out(tensor, kind := getattr(torch, dtype))
    if is_finite(result):
        return result
    if not (allow_nonfinite or is_finite(tensor)):
        raise SourceError(
            f"{name}: holds NaN or infinity; the source is damaged (`porttool convert "
            "--allow-nonfinite` takes it all the same, in any --dtype)"
        )
    rows = (row.nan_to_num(0, 0, 0) for row in torch.atleast_2d(tensor))  # a few KB at a time
    if lost := [float(row.abs().max()) for row in rows if not is_finite(row.to(kind))]:
        wider = "bfloat16 or float32" if dtype == "float16" else "float64"
        raise SourceError(
            f"{name}: values up to {max(lost):.3g} do not fit {dtype}; choose --dtype {wider}"
        )
    return result


def laid_out(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor contiguous and in a type; of a matrix to be turned, the narrow form is."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    narrows = dtype.itemsize < tensor.dtype.itemsize
    if narrows and tensor.dim() == 2 and tensor.t().is_contiguous():
        tensor = packed(tensor.t(), dtype).t()
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else packed(tensor, dtype)


def is_finite(tensor: Tensor) -> bool:
    """Return whether every element is finite, in one pass, with no temporary of its size."""
    # The extremes of a tensor with a NaN are NaN.
    return tensor.numel() == 0 or all(math.isfinite(float(x)) for x in tensor.aminmax())
