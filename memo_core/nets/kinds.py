"""The kinds of layers that a checkpoint's config.json may name. A new one is a file with its class, and a line here."""

from __future__ import annotations

from typing import TypeVar

from ..errors import CheckpointError
from .audio import AudioLayer
from .cross_audio import CrossAudioModule
from .last_frames import LastFramesModule
from .memory_module import MemoryModule
from .multimodal import AudioModule
from .past_attention import PastAttentionModule
from .temporal import TemporalModule

TEMPORAL: dict[str, type[TemporalModule]] = {
    "memory": MemoryModule,
    "last_frames": LastFramesModule,
    "past_attention": PastAttentionModule,
}
AUDIO: dict[str, type[AudioLayer]] = {"multimodal": AudioModule, "cross": CrossAudioModule}

Kind = TypeVar("Kind")


def kind_named(kinds: dict[str, Kind], name: str, setting: str) -> Kind:
    """The class of that name; CheckpointError, with those there are, for another one."""
    if name not in kinds:
        raise CheckpointError(f"config.json: {setting} is {name!r}; there are {', '.join(kinds)}")
    return kinds[name]
