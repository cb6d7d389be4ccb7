"""What one window is denoised under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from ..checkpoint.networks import Networks
from ..inputs.reference import Reference
from ..memory.cache import MemoryCache
from ..memory.state import MemoryEntry, MemoryState
from ..memory.stream import WindowMemory
from ..memory.sums import FP8
from ..nets.conditions import Conditions
from ..nets.temporal import TemporalAttention
from ..release import NULL_EMOTION
from ..running import offload, precision
from ..tensorfile import tensors_digest
from .job import WindowInputs
from .plan import Plan
from .settings import Settings

# To be raised whenever the same inputs come to give another window: stored ones are then not found.
WINDOW_VERSION = 3


class Conditioner:
    """Makes conditions and memory of every window of a portrait, for a checkpoint; keeps what windows share.

    Attributes:
        plan: where the memory lies, and whether the Reference Net and the Diffusion Net take turns on the device; None:
            all is there.
    """

    def __init__(self, nets: Networks, reference: Reference, settings: Settings, cache: MemoryCache):
        self.nets, self.reference, self.cache = nets, reference, cache
        self.settings = settings.for_checkpoint(nets.diffusion_net.config)
        self.plan: Plan | None = None
        self.device, self.dtype = nets.device, nets.diffusion_net.conv_in.weight.dtype
        self.past_dtype = precision.remembered(self.dtype)  # of what later windows remember
        self._reference_features: list[Tensor] | None = None
        self._coming: list[MemoryEntry] = []  # to be asked for
        self._seen: dict[str, list[Tensor]] = {}  # what the Reference Net has seen of some of them, by digest

    @cached_property
    def _tokens(self) -> Tensor:
        return self._face_tokens(self.reference.face_embedding)

    def _face_tokens(self, embedding: Tensor) -> Tensor:
        """[1, 512] -> [2, tokens, C]: unconditional, conditional."""
        return self.nets.image_proj(torch.cat([torch.zeros_like(embedding), embedding]).to(self.device, self.dtype))

    # Rows of the Reference Net. In the released code they are, with guidance, [reference, 16 past frames] twice, and
    # row r reads the unconditional face tokens if r is even.
    def _token_row(self, row: int, conditional: bool) -> int:
        """Which row of the face tokens such a row reads: 0 for the unconditional one."""
        if not self.settings.guided:
            return 1
        return row % 2 if self.settings.face_token_rows == "released" else int(conditional)

    def reference_features(self) -> list[Tensor]:
        """Features of the portrait for the conditional row, [1, K, N, C] per layer."""
        if self._reference_features is None:
            # The released code tiles the rows (0 and 17) of its two portraits over the frames, so that frames see them
            # in turn.
            alternate = self.settings.guided and self.settings.face_token_rows == "released"
            tokens = self._tokens[[row % 2 for row in (0, 1 + self.nets.window)]] if alternate else self._tokens[1:]
            latents = self.reference.latents.to(self.device, self.dtype).expand(len(tokens), -1, -1, -1)
            self._reference_features = [feature[None] for feature in self._look(latents, tokens)]
        return self._reference_features

    def _look(self, latents: Tensor, tokens: Tensor) -> list[Tensor]:
        """The Reference Net's features of pictures."""
        with self._reading():
            return self.nets.reference_net(latents, tokens)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The Reference Net's turn, where the nets take turns."""
        if self.plan is None or self.plan.reference_net_stays:
            yield
            return
        offload.to_host(self.nets.diffusion_net)
        try:
            offload.to_device(self.nets.reference_net, self.device)
            yield
        finally:
            offload.to_host(self.nets.reference_net)
            offload.to_device(self.nets.diffusion_net, self.device)

    def announce(self, entries: list[MemoryEntry]) -> None:
        """Says which windows `past_of` will be asked for next: where the nets take turns, the Reference Net looks at
        several in one, and what it sees of the later ones waits in host memory.
        """
        self._coming, self._seen = list(entries), {}

    def _features(self, entry: MemoryEntry) -> list[Tensor]:
        several = 1 if self.plan is None else self.plan.windows_a_turn
        if entry.digest not in self._seen and several > 1:
            first = next((i for i, coming in enumerate(self._coming) if coming.digest == entry.digest), 0)
            together = self._coming[first : first + several]
            if len(together) > 1:
                with self._reading():
                    for other in together:
                        features = self.nets.reference_net(*self._seen_of(other)[:2])
                        self._seen[other.digest] = [feature.cpu() for feature in features]
        seen = self._seen.pop(entry.digest, None)
        if seen is None:
            return self._look(*self._seen_of(entry)[:2])
        return [feature.to(self.device) for feature in seen]

    def past_of(self, entry: MemoryEntry) -> Iterator[tuple[TemporalAttention, Tensor, Tensor]]:
        """Keys and values of a remembered window's frames, temporal layer by layer, for every batch row."""
        frames, _, height, width = entry.latents.shape
        features, rows = self._features(entry), self._seen_of(entry)[2]
        return self.nets.diffusion_net.past(features, height, width, frames, rows)

    def _seen_of(self, entry: MemoryEntry) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the Reference Net reads of a remembered window: latents and face tokens, and which of these rows each
        frame's is, where some are alike.
        """
        frames = len(entry.latents)
        still = bool((entry.latents == entry.latents[:1]).all())  # the portrait, held still before a video begins
        wanted = [
            (0 if still else frame, self._token_row(b * (1 + self.nets.window) + 1 + frame, bool(b)))
            for b in range(2 if self.settings.guided else 1)
            for frame in range(frames)
        ]
        distinct = list(dict.fromkeys(wanted))  # a frame with the same tokens is looked at once
        which, token_rows = zip(*distinct, strict=True)
        rows = None
        if len(distinct) < len(wanted):
            rows = torch.tensor([distinct.index(row) for row in wanted], device=self.device)
        latents = entry.latents[list(which)].to(self.device, self.dtype)
        return latents, self._face_tokens(entry.face_embedding)[list(token_rows)], rows

    def conditions(self, inputs: WindowInputs) -> Conditions:
        """Those of a window, for every batch row: [unconditional, conditional], or the latter alone."""
        tokens = self.nets.audio_proj(inputs.audio[None].to(self.device, self.dtype))
        emotion = inputs.emotion.to(self.device)
        face = self._tokens[1:]
        if self.settings.guided:
            tokens = torch.cat([torch.zeros_like(tokens), tokens])
            emotion = torch.cat([_null(emotion), emotion])
            face = self._tokens
        return Conditions(
            reference=self.reference_features(),
            face_tokens=face,
            audio_tokens=tokens,
            emotion=emotion,
            frames=self.nets.window,
        )

    def memory(self, state: MemoryState) -> WindowMemory:
        """What the temporal layers remember of a state, for every batch row; valid until the next call."""
        settings, plan = self.settings, self.plan
        context = f"{self.nets.digest}|{self.dtype}|{self.device}|{settings.guided}|{settings.face_token_rows}"
        return self.cache.memory_of(
            state,
            context,
            self.past_of,
            frames=self.nets.diffusion_net.past_frames,
            dtype=FP8 if settings.speed.fp8_sums else None,
            on_device=None if plan is None else plan.sums_on_device,
            announce=self.announce,
        )

    @cached_property
    def address(self) -> str:
        """What windows of this sampler share, for `WindowInputs.key`."""
        reference = tensors_digest(self.reference.latents, self.reference.face_embedding)
        dtype = f"{self.dtype} {precision.VERSION}" if self.dtype in precision.HALF else f"{self.dtype}"
        return f"{WINDOW_VERSION}|{self.nets.digest}|{dtype}|{self.device.type}|{reference}|{self.settings.address}"


def _null(emotion: Tensor) -> Tensor:
    """The null emotion in the form of `emotion`: labels, or class weights [..., 10]."""
    if not emotion.is_floating_point():
        return torch.full_like(emotion, NULL_EMOTION)
    null = torch.zeros_like(emotion)
    null[..., NULL_EMOTION] = 1
    return null
