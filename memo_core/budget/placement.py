"""Placement: who has the networks on the device while they work, and makes room for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from .. import devices
from ..checkpoint.networks import Networks
from ..memory.cache import MemoryCache
from ..running import offload
from ..sampling.job import Job
from ..sampling.plan import Plan
from .device import available_bytes
from .plan import choose_plan, smaller_plan


class Placement(Protocol):
    """What `MemoPipeline` asks before its networks work."""

    def listen(self, seconds: float) -> None:
        """Speech and emotion networks are about to hear so many seconds at once."""
        ...

    def stop_listening(self) -> None:
        """They are not needed while pictures are made."""
        ...

    def look(self, height: int, width: int) -> None:
        """The VAE is about to encode or decode pictures of this size."""
        ...

    def plan(self, job: Job) -> Plan | None:
        """How to sample the job; None where that is no matter. SamplingError, with what would fit, if nothing does."""
        ...

    def smaller_plan(self, job: Job, than: Plan) -> Plan | None:
        """The next plan that takes less; None after the last."""
        ...

    def computing(self) -> AbstractContextManager[object]:
        """A context in which windows are sampled."""
        ...


class OwnPlacement:
    """The pipeline's own device: networks that listen and networks that paint take turns on it.

    Args:
        nets: the networks.
        memory: the resident memory, which the next clip may give up.
    """

    def __init__(self, nets: Networks, memory: MemoryCache):
        self.nets, self.memory = nets, memory

    def _listeners(self) -> list[nn.Module]:
        nets = (self.nets.speech_encoder, self.nets.emotion_encoder, self.nets.emotion_head)
        return [net for net in nets if net is not None]

    def listen(self, seconds: float) -> None:
        """Brings them to the device."""
        for net in self._listeners():
            offload.to_device(net, self.nets.device)

    def stop_listening(self) -> None:
        """Sends them to host memory."""
        for net in self._listeners():
            offload.to_host(net)

    def look(self, height: int, width: int) -> None:
        """Nothing: the VAE stays on the device."""

    def plan(self, job: Job) -> Plan | None:
        """Within what is free on the device; None on the CPU."""
        devices.empty_cache(self.nets.device)  # what listening left behind lies in pieces
        room = available_bytes(self.nets)
        if room is None:
            return None
        height, width = job.reference.pixels.shape[1:]
        return choose_plan(self.nets, height, width, job.settings, room + self.memory.device_bytes)

    def smaller_plan(self, job: Job, than: Plan) -> Plan | None:
        """See `Placement`."""
        height, width = job.reference.pixels.shape[1:]
        return smaller_plan(self.nets, height, width, job.settings, than)

    def computing(self) -> AbstractContextManager[object]:
        """Nothing special."""
        return nullcontext()
