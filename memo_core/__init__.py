"""MEMO talking video: a portrait and a voice in, a video out, with the memory as a value. See `MemoPipeline`.

Names are imported when first used, so that `import memo_core` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import MemoError
    from .inputs.emotion import EmotionTrack
    from .inputs.reference import Reference
    from .inputs.speech import AudioTrack
    from .memory.state import MemoryState
    from .pipeline import MemoPipeline
    from .release import EMOTIONS
    from .video.clips import Clip

__version__ = "0.2.0"
__all__ = ["EMOTIONS", "AudioTrack", "Clip", "EmotionTrack", "MemoError", "MemoPipeline", "MemoryState", "Reference"]

_MODULES = {
    "EMOTIONS": "release",
    "AudioTrack": "inputs.speech",
    "Clip": "video.clips",
    "EmotionTrack": "inputs.emotion",
    "MemoError": "errors",
    "MemoPipeline": "pipeline",
    "MemoryState": "memory.state",
    "Reference": "inputs.reference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
