"""The nodes, one thin class each. What they compute lives in memo_core."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .clips import ClipToImages, ConcatClips, ImagesToClip, InspectClip
from .emotion import DetectAudioEmotion, EditEmotion
from .host.folders import register_models_folder
from .load import LoadMEMO
from .memory import BlendMemoryStates, InspectMemoryState, LoadMemoryState, SaveMemoryState
from .portrait import CropPortrait, EncodeReference, PasteBack
from .sample import SampleClip, TalkingVideo
from .voice import EncodeAudio, Example


class MemoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_models_folder()
        return [
            TalkingVideo,
            LoadMEMO,
            EncodeReference,
            EncodeAudio,
            DetectAudioEmotion,
            EditEmotion,
            LoadMemoryState,
            SaveMemoryState,
            BlendMemoryStates,
            InspectMemoryState,
            SampleClip,
            ClipToImages,
            ImagesToClip,
            ConcatClips,
            InspectClip,
            CropPortrait,
            PasteBack,
            Example,
        ]
