"""Pictures of what a run has learned take less memory than its steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from test_budget import TINY
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memo_core.memory.sums import LayerMemory
from memo_core.running.host_memory import HostMemory
from memo_core.sampling.settings import Settings
from training import budget, counting, presets, preview
from training.config import Stage
from training.learning import prepare_to_learn
from training.nets import Nets


class OnDevice(counting.Live):
    """Counts what is not made by a function that `elsewhere` has wrapped."""

    off = False

    def elsewhere(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            self.off = True
            try:
                return function(*args, **more)
            finally:
                self.off = False

        return wrapped

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if not self.off:
            super()._see(storage)
        elif key not in self._births and key not in self._ignored:
            self._ignored.add(key)
            weakref.finalize(storage, self._ignored.discard, key)


def peak_of_preview(stage: Stage, guidance: float) -> int:
    """Bytes beside the weights, as on a device with memory of its own: the processor's tensors stand in for its."""
    live, layers = OnDevice(), list[LayerMemory]()
    for_, fetch, begin = HostMemory.for_.__func__, LayerMemory.fetch, LayerMemory.__init__

    def fetched(layer: LayerMemory, *args: Any) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in fetch(layer, *args))

    def begun(layer: LayerMemory, *args: Any, **more: Any) -> None:
        layers.append(layer)
        begin(layer, *args, **more)

    with torch.device("meta"):
        nets = Nets(TINY)
        prepare_to_learn(nets, stage)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        nets.to_empty(device="cpu").eval()
        batch = budget.example(stage, TINY, 64)
        for owner, name, put in (
            (Tensor, "cpu", live.elsewhere(Tensor.clone)),
            (HostMemory, "for_", classmethod(live.elsewhere(for_))),
            (LayerMemory, "fetch", fetched),
            (LayerMemory, "__init__", begun),
        ):
            stack.enter_context(mock.patch.object(owner, name, put))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        live.ignore([*nets.parameters(), *nets.buffers()])
        stack.enter_context(live)
        stack.enter_context(counting._as_on_cuda())
        preview.sample(nets, batch, torch.zeros_like(batch.latents), Settings(steps=2, guidance_scale=guidance))
    assert all(layer.on_host for layer in layers), "what is remembered waits in host memory"
    # Three buffers, through which layers come from the host.
    return live.peak + 3 * max((layer.buffer_bytes(slice(None)) for layer in layers if layer.on_host), default=0)


@pytest.mark.parametrize("preset", [presets.memo_lora, presets.memo_stage2])
def test_a_preview_takes_less_memory_than_a_step(preset: Callable[[], Stage]) -> None:
    """Guidance costs it next to nothing, and a run that has begun does not fail at its first picture."""
    stage = preset()
    stage = replace(stage, lora=replace(stage.lora, rank=2)) if stage.lora.rank else stage
    guided, step = peak_of_preview(stage, 3.5), budget.count(stage, TINY, 64).step
    assert guided < 1.1 * peak_of_preview(stage, 1.0)
    assert guided < step.peak - step.peak_gradients
