"""The torch runner: picks the device's decoder and speaks the runner's contract for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from porttool.component import Options
from porttool.device import Device, choose_device
from porttool.errors import EngineError, MissingExtra
from porttool.runner import Choose, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.engine import Engine
    from porttool.engines.torch.device_decoder import CanonicalDecoder, DeviceDecoder
    from porttool.nn import Step


_log = logging.getLogger(__name__)
"""Where loading says what takes minutes or is not as built; on standard error by default."""


class TorchOptions(Options):
    """`device`: auto takes the GPU if there is one. `canonical`: the slow reference decoder.

    `compiled` false keeps a CPU to plain torch, as where there is no compiler. `retune` auto
    measures the kernels' tiles, once, where an engine was tuned on another GPU; true also where
    it never was; false takes nothing but what was measured at build. `graphs` false launches a
    GPU's kernels one by one, for profilers that shall see every layer as a range.
    """

    device: Device = "auto"
    canonical: bool = False
    compiled: bool = True
    retune: bool | Literal["auto"] = "auto"
    graphs: bool = True


class TorchRunner(Runner):
    """Runs a torch engine on a CPU or a GPU."""

    name = "torch"
    Options = TorchOptions
    options: TorchOptions
    traces = True
    hashes_weights = True

    def __init__(self, engine: Engine, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(engine, options)
        if engine.manifest.world_size != 1:
            raise EngineError(
                f"{engine.path} is built for {engine.manifest.world_size} ranks; "
                "build it with --tp 1 to run it in one process"
            )
        self.device = choose_device(self.options.device)
        self._decoder = self._make_decoder()
        self._table: Tensor | None = None

    @property
    def description(self) -> str:
        """Kind, device and type."""
        return f"torch, {self._decoder.description}, {self.engine.manifest.dtype}"

    @property
    def decodes_on_device(self) -> bool:  # type: ignore[override]
        """True on a GPU, and on a CPU with compiled code."""
        return self._decoder.decodes_on_device

    @property
    def tokens_at_once(self) -> int:  # type: ignore[override]
        """Fewer where reading a large model's weights takes a CPU long."""
        return self._decoder.tokens_at_once

    def step(self, step: Step, *, all_positions: bool = False) -> Tensor:
        """Feed tokens; return logits."""
        self.check(step)
        return self._decoder.step(step, all_positions=all_positions)

    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Copy cache rows."""
        self._decoder.copy_slots(source, target)

    def decode(self, step: Step, n_tokens: int, choose: Choose | None = None) -> Tensor:
        """Return the next tokens; as many as the device can choose by itself."""
        if choose is None and self.decodes_on_device:
            return self._decoder.decode(step, n_tokens)
        if choose is not None and self._decoder.samples_on_device:
            return self._decoder.sample(step, n_tokens, choose)
        return super().decode(step, n_tokens, choose)

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Use a prompt table that fits the room reserved at build."""
        self.require_room(table)
        self._decoder.load_prompt_table(table)
        self._table = table
        self.prompt_rows = 0 if table is None else len(table)

    def trace(self, step: Step) -> dict[str, Tensor]:
        """Run the engine's weights through the canonical decoder and record every operation."""
        from porttool.nn.trace import traced

        canonical = self._canonical()
        canonical.load_prompt_table(self._table)
        return traced(canonical.module, step)

    def _canonical(self) -> CanonicalDecoder:
        import torch

        from porttool.engines.torch.device_decoder import CanonicalDecoder
        from porttool.engines.torch.loading import load_weights

        manifest = self.engine.manifest
        return CanonicalDecoder(
            manifest.config,
            load_weights(self.engine),
            dtype=getattr(torch, manifest.dtype),
            limits=manifest.limits,
            device=self.device,
        )

    def _make_decoder(self) -> DeviceDecoder:
        if self.options.canonical:
            return self._canonical()
        import torch

        manifest = self.engine.manifest
        if self.device != "cpu":
            return self._cuda()
        from porttool.engines.torch.cpu import CpuDecoder
        from porttool.engines.torch.loading import load_weights

        return CpuDecoder(
            manifest.config,
            load_weights(self.engine),
            dtype=getattr(torch, manifest.dtype),
            limits=manifest.limits,
            native=self.options.compiled,
        )

    def _cuda(self) -> DeviceDecoder:
        """Return the kernels' decoder, or the canonical one and in its description why."""
        import torch

        try:
            from porttool.engines.torch.cuda import CudaDecoder
            from porttool.engines.torch.cuda_limits import unsupported
            from porttool.engines.torch.loading import load_weights
            from porttool.engines.torch.tiles import tiles_at_load
        except ModuleNotFoundError as error:
            raise MissingExtra("gpu", "triton") from error
        manifest = self.engine.manifest
        dtype = getattr(torch, manifest.dtype)
        reason = unsupported(manifest.config, dtype)
        if reason:
            decoder = self._canonical()
            decoder.description += f" (not the Triton kernels: {reason})"
            return decoder
        tiles = tiles_at_load(self.engine, self.device, self.options.retune, _log.warning)
        return CudaDecoder(
            manifest.config,
            load_weights(self.engine, self.device),
            dtype=dtype,
            limits=manifest.limits,
            device=self.device,
            tuning=tiles.tuning.as_dict() if tiles.tuning else None,
            graphs=self.options.graphs,
        )
