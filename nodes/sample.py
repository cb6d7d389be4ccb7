"""Sampling: a clip from a portrait, a voice and a memory; and all of it in one node."""

from __future__ import annotations

from collections.abc import Mapping

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..memo_core.inputs.emotion import EmotionTrack
from ..memo_core.inputs.reference import Reference
from ..memo_core.memory.state import MemoryState
from ..memo_core.pipeline import MemoPipeline
from ..memo_core.release import EMOTIONS
from ..memo_core.sampling.settings import PRESETS
from .clips import write_video
from .emotion import detect
from .host.folders import lost_videos, video_of
from .host.media import one_picture, sound_of
from .portrait import alpha_mask_input
from .run import sample
from .voice import encode_voice
from .wires import CATEGORY, MemoAudio, MemoClip, MemoEmotion, MemoMemory, MemoModel, MemoReference, Voice, one_of

FEELINGS = ("detect", "none", *EMOTIONS)  # of a video made in one node
EXACT = "exact"


def _sampling_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=20,
            min=1,
            max=200,
            tooltip="Sampling steps per window (the frames that are denoised together).",
        ),
        io.Float.Input(
            "guidance",
            default=3.5,
            min=1.0,
            max=20.0,
            step=0.1,
            tooltip="How strictly portrait and voice are followed. 1 is no guidance, in half the time and memory.",
        ),
        io.Int.Input(
            "seed",
            default=42,
            min=0,
            max=2**64 - 1,
            control_after_generate=False,  # or the frontend draws another one for every run, and nothing is found again
            tooltip="Of the noise. While it stays the same, windows that were rendered once are not rendered again.",
        ),
    ]


def _speed_input() -> io.Input:
    # Optional, and the last widget: graphs from before there was a choice still load, and render what they did.
    return io.Combo.Input(
        "speed",
        options=list(PRESETS),
        default=EXACT,
        optional=True,
        tooltip="exact leaves nothing out; balanced renders faster, in at most 10 steps, with slightly other frames; "
        "draft is the fastest, in at most 6, for a first look.",
    )


class SampleClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_SampleClip",
            display_name="MEMO Sample Clip",
            category=CATEGORY,
            description="Renders a clip of the talking head. Wire memory and end into the next MEMO Sample Clip to go "
            "on: the video continues where this clip ended. What was rendered before is taken from the store.",
            inputs=[
                MemoModel.Input("model", tooltip="From Load MEMO."),
                MemoReference.Input("reference", tooltip="From MEMO Encode Reference."),
                MemoAudio.Input("audio", tooltip="From MEMO Encode Audio: the whole recording, for every clip."),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=36000.0,
                    step=0.01,
                    tooltip="Second of the recording at which the clip begins.",
                ),
                io.Float.Input(
                    "duration",
                    default=0.0,
                    min=0.0,
                    max=36000.0,
                    step=0.01,
                    tooltip="Seconds; 0 is to the end. Clips of whole windows (multiples of 1.6 s at 30 fps) join to "
                    "exactly the video that one clip would be.",
                ),
                *_sampling_inputs(),
                io.Boolean.Input(
                    "stop_on_collapse",
                    default=False,
                    tooltip="End the clip when its picture breaks down (grey, noise, wild colours), instead of "
                    "rendering on.",
                ),
                MemoEmotion.Input("emotion", optional=True, tooltip="From Detect or Edit Emotion; without it, none."),
                MemoMemory.Input("memory", optional=True, tooltip="What came before; without it, a new video."),
                _speed_input(),
            ],
            outputs=[
                MemoClip.Output(display_name="clip", tooltip="The frames, not decoded yet, with their sound."),
                MemoMemory.Output(display_name="memory", tooltip="For the clip after this one."),
                io.Float.Output(display_name="end", tooltip="Second at which the clip ends: the next one's start."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, speed: str = EXACT) -> bool | str:
        return one_of(speed=(speed, PRESETS))

    @classmethod
    def execute(
        cls,
        model: MemoPipeline,
        reference: Reference,
        audio: Voice,
        start: float,
        duration: float,
        steps: int,
        guidance: float,
        seed: int,
        stop_on_collapse: bool,
        emotion: EmotionTrack | None = None,
        memory: MemoryState | None = None,
        speed: str = EXACT,
    ) -> io.NodeOutput:
        clip, memory = sample(
            model,
            reference,
            audio,
            emotion,
            memory,
            start=start,
            duration=duration,
            steps=steps,
            guidance=guidance,
            seed=seed,
            speed=speed,
            stop_on_collapse=stop_on_collapse,
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(clip, memory, (clip.start + clip.num_frames) / clip.fps)


class TalkingVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_TalkingVideo",
            display_name="MEMO Talking Video",
            category=CATEGORY,
            description="A portrait and a recording in, a talking video out (talking head, lip sync, avatar), in one "
            "node. The other MEMO nodes are its parts.",
            inputs=[
                MemoModel.Input("model", tooltip="From Load MEMO."),
                io.Image.Input("image", tooltip="One picture of a face. Transparent parts become white."),
                io.Audio.Input("audio", tooltip="The recording that is spoken."),
                io.Combo.Input(
                    "emotion",
                    options=list(FEELINGS),
                    default="detect",
                    tooltip="detect: as heard in the voice. none: leave it to the model. Or one for the whole video.",
                ),
                *_sampling_inputs(),
                MemoMemory.Input("memory", optional=True, tooltip="Goes on from an earlier video; without it, anew."),
                _speed_input(),
                alpha_mask_input(),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="With sound; for Save Video."),
                MemoMemory.Output(display_name="memory", tooltip="For Save Memory State, or the next video."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, emotion: str = "detect", speed: str = EXACT) -> bool | str:
        return one_of(emotion=(emotion, FEELINGS), speed=(speed, PRESETS))

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        return lost_videos()

    @classmethod
    def execute(
        cls,
        model: MemoPipeline,
        image: Tensor,
        audio: Mapping,
        emotion: str,
        steps: int,
        guidance: float,
        seed: int,
        memory: MemoryState | None = None,
        speed: str = EXACT,
        alpha_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        portrait, sound = one_picture(image, alpha_mask), sound_of(audio)
        reference = model.encode_reference(portrait, size=model.default_size, crop="face")
        voice = encode_voice(model, sound, node_id=node_id)
        if emotion == "detect":
            track, _ = detect(model, voice)
        elif emotion == "none":
            track = None
        else:
            track = EmotionTrack.constant(emotion, voice.track.num_padded_frames, voice.track.fps)
        clip, memory = sample(
            model,
            reference,
            voice,
            track,
            memory,
            steps=steps,
            guidance=guidance,
            seed=seed,
            speed=speed,
            node_id=node_id,
        )
        return io.NodeOutput(video_of(write_video([clip], node_id=node_id)), memory)
