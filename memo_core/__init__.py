"""MEMO talking video: a portrait and a voice in, a video out, with the memory as a value. See `MemoPipeline`.

Names are imported when first used, so that `import memo_core` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audio import AudioTrack
    from .clips import Clip
    from .emotion import EMOTIONS, EmotionTrack
    from .errors import MemoError
    from .memory import MemoryState
    from .pipeline import MemoPipeline
    from .reference import Reference

__version__ = "0.1.0"
__all__ = ["EMOTIONS", "AudioTrack", "Clip", "EmotionTrack", "MemoError", "MemoPipeline", "MemoryState", "Reference"]

_MODULES = {
    "EMOTIONS": "emotion",
    "AudioTrack": "audio",
    "Clip": "clips",
    "EmotionTrack": "emotion",
    "MemoError": "errors",
    "MemoPipeline": "pipeline",
    "MemoryState": "memory",
    "Reference": "reference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
