"""The emotion: heard in the voice, shown on the node, edited by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..memo_core.errors import MemoError
from ..memo_core.inputs.emotion import EmotionTrack
from ..memo_core.inputs.emotion_lines import parse_emotion_lines
from ..memo_core.inputs.speech import count_frames
from ..memo_core.pipeline import MemoPipeline
from ..memo_core.release import EMOTIONS
from ..memo_core.video.clips import Sound
from .host.media import preview, sound_of, to_image
from .wires import CATEGORY, MemoAudio, MemoEmotion, MemoModel, Voice


class DetectAudioEmotion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_DetectAudioEmotion",
            display_name="Detect Audio Emotion",
            category=CATEGORY,
            description="Hears the emotion of a voice, second by second: happy, sad, angry, surprised and others. It "
            "sets the facial expression of the talking head.",
            inputs=[
                MemoModel.Input("model", tooltip="From Load MEMO."),
                io.MultiType.Input(
                    "audio", [io.Audio, MemoAudio], tooltip="The recording, or what MEMO Encode Audio made of it."
                ),
                io.Float.Input(
                    "sensitivity",
                    default=1.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="Above 1, emotions win over neutral sooner; below 1, later. 1 is as released.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    tooltip="Seconds over which the detector's opinion is averaged, against flicker. 0 is as released.",
                ),
            ],
            outputs=[
                MemoEmotion.Output(display_name="emotion", tooltip="A label for every frame."),
                io.String.Output(display_name="text", tooltip="The emotions as lines that Edit Emotion understands."),
                io.Image.Output(display_name="picture", tooltip="Waveform, labels and probabilities."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: MemoPipeline, audio: Mapping | Voice, sensitivity: float, smoothing: float
    ) -> io.NodeOutput:
        track, speech = detect(model, audio, sensitivity, smoothing)
        picture = draw(track, speech)
        return io.NodeOutput(track, track.describe(), picture, ui=preview(picture, cls))


class EditEmotion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_EditEmotion",
            display_name="Edit Emotion",
            category=CATEGORY,
            description="Changes the emotion of parts of the video: one line each, such as `0.0-2.5 happy`, "
            "`2.5-4 angry 0.7` or `4-end sad`. Sets the facial expression over time.",
            inputs=[
                MemoEmotion.Input("emotion", tooltip="From Detect Audio Emotion."),
                io.String.Input(
                    "lines",
                    multiline=True,
                    default="0-end happy",
                    tooltip=f"from-to emotion [strength 0 to 1]. Times in seconds or m:ss. Emotions: "
                    f"{', '.join(EMOTIONS)}. What no line names stays as it is; # starts a comment.",
                ),
                io.MultiType.Input(
                    "audio", [io.Audio, MemoAudio], optional=True, tooltip="Draws the waveform into the picture."
                ),
            ],
            outputs=[
                MemoEmotion.Output(display_name="emotion", tooltip="The edited labels."),
                io.String.Output(display_name="text", tooltip="All emotions after the edit, as lines."),
                io.Image.Output(display_name="picture", tooltip="Labels and probabilities after the edit."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, lines: str = "") -> bool | str:
        try:
            parse_emotion_lines(lines or "")
        except MemoError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, emotion: EmotionTrack, lines: str, audio: Mapping | Voice | None = None) -> io.NodeOutput:
        track = emotion.edited(lines)
        picture = draw(track, None if audio is None else speech_of(audio))
        return io.NodeOutput(track, track.describe(), picture, ui=preview(picture, cls))


def detect(
    model: MemoPipeline, audio: Mapping | Voice, sensitivity: float = 1.0, smoothing: float = 0.0
) -> tuple[EmotionTrack, Sound]:
    """See DetectAudioEmotion; also what was listened to."""
    speech = speech_of(audio)
    if isinstance(audio, Voice):
        frames, fps = audio.track.num_padded_frames, audio.track.fps
    else:
        fps, window = model.nets.fps, model.nets.window
        frames = count_frames(speech.waveform.shape[1], speech.sample_rate, fps)
        frames = window * math.ceil(frames / window)
    track = model.detect_emotion(speech.waveform, speech.sample_rate, frames, fps, sensitivity, smoothing)
    return track, speech


def speech_of(audio: Mapping | Voice) -> Sound:
    """The voice in AUDIO or MEMO_AUDIO."""
    return audio.speech if isinstance(audio, Voice) else sound_of(audio)


def draw(track: EmotionTrack, speech: Sound | None) -> Tensor:
    """An IMAGE of the track."""
    from ..memo_core.judging.drawings.emotion import draw_emotion

    if speech is None:
        return to_image(draw_emotion(track))
    return to_image(draw_emotion(track, speech.waveform, speech.sample_rate))
