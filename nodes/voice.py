"""The voice: an example to start with, and speech features per frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from comfy_api.v0_0_2 import io

from ..memo_core.checkpoint.layout import VOCAL_SEPARATOR, assets, download_command
from ..memo_core.errors import AudioError
from ..memo_core.pipeline import MemoPipeline
from ..memo_core.video.clips import Sound
from .host.media import audio_of, sound_of, to_image
from .host.progress import Progress, stop_if_interrupted
from .wires import CATEGORY, MemoAudio, MemoModel, Voice, one_of

EXAMPLES = {"voice": "voice.wav", "song": "song.flac"}
CONTEXTS = ("local", "whole")
SEPARATION = ("off", "spectral", "Kim Vocal 2")


class Example(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_Example",
            display_name="MEMO Example",
            category=CATEGORY,
            description="A portrait and a recording to try this pack with. Put Load Image and Load Audio in its place "
            "to make your own talking head.",
            inputs=[
                io.Combo.Input(
                    "speech",
                    options=list(EXAMPLES),
                    default="voice",
                    tooltip="voice: a few sentences, happy and then neutral. song: a voice over music.",
                )
            ],
            outputs=[
                io.Image.Output(display_name="portrait", tooltip="A cartoon face."),
                io.Audio.Output(display_name="audio", tooltip="The recording."),
            ],
        )

    @classmethod
    def validate_inputs(cls, speech: str = "voice") -> bool | str:
        return one_of(speech=(speech, EXAMPLES))

    @classmethod
    def execute(cls, speech: str) -> io.NodeOutput:
        from ..memo_core.inputs.pictures import open_picture
        from ..memo_core.inputs.sound import load_audio

        portrait = to_image(open_picture(assets() / "portrait.png"))
        return io.NodeOutput(portrait, audio_of(Sound(*load_audio(assets() / EXAMPLES[speech]))))


class EncodeAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_EncodeAudio",
            display_name="MEMO Encode Audio",
            category=CATEGORY,
            description="Turns a recording into what drives the mouth: speech features for every frame of the video "
            "(lip sync).",
            inputs=[
                MemoModel.Input("model", tooltip="From Load MEMO."),
                io.Audio.Input("audio", tooltip="The recording to be spoken, of any length and sample rate."),
                io.Float.Input(
                    "fps",
                    default=30,
                    min=1,
                    max=240,
                    step=0.01,
                    tooltip="Frames per second of the video. Best those that the checkpoint was trained at: 30 for "
                    "toon and the released weights.",
                ),
                io.Combo.Input(
                    "context",
                    options=list(CONTEXTS),
                    default="local",
                    tooltip="local: features hear the sound around them alone, so that editing the end leaves the "
                    "beginning as it is, at any length. whole: the recording at once, as released; up to 5 minutes.",
                ),
                io.Combo.Input(
                    "separate_vocals",
                    options=list(SEPARATION),
                    default="off",
                    tooltip="Lets the voice alone drive the face. spectral: needs nothing, for repeating music. "
                    "Kim Vocal 2: the released way, needs the audio-separator package and the checkpoint's model. Both "
                    "hear the whole recording: after an edit all of it is rendered again.",
                ),
                io.Boolean.Input(
                    "silence_gate",
                    default=False,
                    tooltip="In silent stretches the mouth rests, whatever noise there is.",
                ),
            ],
            outputs=[MemoAudio.Output(display_name="audio", tooltip="Speech features, with their sound.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, context: str = "local", separate_vocals: str = "off") -> bool | str:
        return one_of(context=(context, CONTEXTS), separate_vocals=(separate_vocals, SEPARATION))

    @classmethod
    def execute(
        cls,
        model: MemoPipeline,
        audio: Mapping,
        fps: float,
        context: Literal["local", "whole"],
        separate_vocals: str,
        silence_gate: bool,
    ) -> io.NodeOutput:
        sound = sound_of(audio)
        return io.NodeOutput(
            encode_voice(model, sound, fps, context, separate_vocals, silence_gate, cls.hidden.unique_id)
        )


def encode_voice(
    model: MemoPipeline,
    sound: Sound,
    fps: float | None = None,
    context: Literal["local", "whole"] = "local",
    separation: str = "off",
    silence_gate: bool = False,
    node_id: str | None = None,
) -> Voice:
    """See EncodeAudio."""
    fps = model.nets.fps if fps is None else fps
    from ..memo_core.inputs.separation import separate_vocals, separate_vocals_spectral
    from ..memo_core.inputs.speech import MAX_WHOLE_SECONDS, count_frames

    if context == "whole" and sound.seconds > MAX_WHOLE_SECONDS:
        raise AudioError(
            f"the recording lasts {sound.seconds:.0f} s; context 'whole' is for up to {MAX_WHOLE_SECONDS} s: "
            "set context to 'local'"
        )
    speech = sound
    if separation == "spectral":
        speech = Sound(separate_vocals_spectral(sound.waveform, sound.sample_rate)[0], sound.sample_rate)
    elif separation != "off":
        model_file = model.nets.folder / VOCAL_SEPARATOR
        if not model_file.is_file():
            raise AudioError(
                f"{model_file} does not exist: set separate_vocals to 'spectral', or fetch it with "
                f"{download_command(model.nets.folder)} --only vocal_separator"
            )
        speech = Sound(*separate_vocals(sound.waveform, sound.sample_rate, model_file))
    bar = Progress(node_id, 1000)

    def progress(done: int, total: int) -> None:
        stop_if_interrupted()
        bar.update(1000 * done // total)

    track = model.encode_audio(
        speech.waveform,
        speech.sample_rate,
        fps,
        None if context == "whole" else context,
        silence_gate=silence_gate,
        progress=progress,
        num_frames=count_frames(sound.waveform.shape[1], sound.sample_rate, fps),
    )
    return Voice(track, sound, speech)
