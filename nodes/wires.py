"""What travels between the nodes, and the names of the wires."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from comfy_api.v0_0_2 import io

from ..memo_core.checks import shown
from ..memo_core.inputs.speech import AudioTrack
from ..memo_core.video.clips import Sound

MemoModel = io.Custom("MEMO_MODEL")  # memo_core.pipeline.MemoPipeline, placed by the host
MemoReference = io.Custom("MEMO_REFERENCE")  # memo_core.Reference
MemoAudio = io.Custom("MEMO_AUDIO")  # Voice
MemoEmotion = io.Custom("MEMO_EMOTION")  # memo_core.EmotionTrack
MemoMemory = io.Custom("MEMO_MEMORY")  # memo_core.MemoryState
MemoClip = io.Custom("MEMO_CLIP")  # memo_core.video.clips.Clip or ImageClip
MemoBox = io.Custom("MEMO_BOX")  # memo_core.video.compose.Box

CATEGORY = "MEMO"


@dataclass(frozen=True, eq=False)
class Voice:
    """An encoded recording.

    Attributes:
        track: speech features per frame.
        sound: what the viewer hears.
        speech: what the networks hear: the same, or the voice alone.
    """

    track: AudioTrack
    sound: Sound
    speech: Sound


def one_of(**choices: tuple[str, Iterable[str]]) -> bool | str:
    """For validate_inputs: whether each widget has one of its values. The host leaves that to the nodes.

    Args:
        choices: widget's name = (its value, the values it may have).
    """
    for name, (value, allowed) in choices.items():
        allowed = list(allowed)
        if value not in allowed:
            return f"{name} is {shown(value)}; it must be one of: {', '.join(allowed)}"
    return True
