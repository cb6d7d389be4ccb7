"""Clips: to pictures and back, looked at, and joined to a video."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..memo_core.errors import ComposeError, SamplingError
from ..memo_core.inputs.reference import Reference
from ..memo_core.pipeline import MemoPipeline
from ..memo_core.release import WINDOW
from ..memo_core.video.clips import Clip, ImageClip, Sound
from .host.folders import lost_videos, temporary_video, video_of
from .host.media import audio_of, preview, sound_of, to_image
from .host.placement import refuse_without_room
from .host.progress import Progress, stop_if_interrupted
from .wires import CATEGORY, MemoClip, MemoModel, MemoReference, one_of

AnyClip = Clip | ImageClip
SLOTS = 16  # clips that Concat Clips takes by wire
FPS = 30  # of plain images, unless said otherwise
SIZES = ("refuse", "scale to first")


class ClipToImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_ClipToImages",
            display_name="MEMO Clip To Images",
            category=CATEGORY,
            description="Decodes a clip to images, for upscalers, face restorers and any other image node. Images To "
            "MEMO Clip is the way back.",
            inputs=[MemoClip.Input("clip", tooltip="From MEMO Sample Clip.")],
            outputs=[
                io.Image.Output(display_name="images", tooltip="All frames."),
                io.Audio.Output(display_name="audio", tooltip="The part of the recording that they speak."),
                io.Float.Output(display_name="fps", tooltip="Frames per second."),
            ],
        )

    @classmethod
    def execute(cls, clip: AnyClip) -> io.NodeOutput:
        height, width = clip.size
        refuse_without_room(12 * clip.num_frames * height * width, f"{clip.num_frames} frames of {width}x{height}")
        images = torch.empty(clip.num_frames, height, width, 3)
        for number, frame in enumerate(watched(clip.frames())):
            images[number] = torch.from_numpy(frame) / 255
        sound = clip.own_sound or Sound(torch.zeros(1, max(1, round(16000 * clip.seconds))), 16000)
        return io.NodeOutput(images, audio_of(sound), float(clip.fps))


class ImagesToClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_ImagesToClip",
            display_name="Images To MEMO Clip",
            category=CATEGORY,
            description="Makes a clip of images, for example of upscaled ones, at any size. The clip they came from "
            "brings back their time, speed and sound.",
            inputs=[
                io.Image.Input("images", tooltip="The frames, one picture each. Transparent parts become white."),
                io.Float.Input(
                    "fps",
                    default=FPS,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames per second, where no clip is connected.",
                ),
                MemoClip.Input(
                    "clip", optional=True, tooltip="The clip the images came from: its time, fps and sound."
                ),
                io.Audio.Input("audio", optional=True, tooltip="Another sound, beginning with the first frame."),
            ],
            outputs=[MemoClip.Output(display_name="clip", tooltip="For Concat Clips and all other clip nodes.")],
        )

    @classmethod
    def execute(
        cls, images: Tensor, fps: float, clip: AnyClip | None = None, audio: Mapping | None = None
    ) -> io.NodeOutput:
        start, sound = 0.0, None
        about: Mapping[str, Any] = {}
        if clip is not None:
            # More images than the clip has frames were interpolated: they last as long as it did.
            denser = max(1.0, len(images) / max(1, clip.num_frames))
            start, fps, about, sound = clip.start * denser, clip.fps * denser, clip.about, clip.sound
        if audio is not None:
            start, sound = 0, sound_of(audio)
        return io.NodeOutput(image_clip("images", images, fps, round(start), sound, about))


class ConcatClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        slots = [
            io.MultiType.Input(
                f"clip_{number}",
                [MemoClip, io.Image],
                optional=True,
                tooltip=f"Clip or images number {number}. Empty places are skipped.",
            )
            for number in range(1, SLOTS + 1)
        ]
        return io.Schema(
            node_id="MEMO_ConcatClips",
            display_name="Concat Clips",
            category=CATEGORY,
            description="Joins clips and images, in their order, to one video with sound. Encodes as it goes: however "
            "long the video, it never lies in memory as a whole.",
            inputs=[
                *slots,
                io.MultiType.Input(
                    "clips", [MemoClip, io.Image], optional=True, tooltip="A list of clips, after the numbered ones."
                ),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="Sound of the whole video, from its beginning. Without it every clip brings its own.",
                ),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Of the video; frames are repeated or left out, nothing gets slower. 0: the clips' own (30 "
                    "for images).",
                ),
                io.Int.Input(
                    "cross_fade",
                    default=0,
                    min=0,
                    max=120,
                    tooltip="Frames over which the last picture of a clip fades into the next clip. Nothing gets "
                    "shorter, so the sound stays in time.",
                ),
                io.Combo.Input(
                    "sizes",
                    options=list(SIZES),
                    default="refuse",
                    tooltip="What to do with a clip of another size than the first: refuse, or scale it to fit, with "
                    "black bars where its proportions differ.",
                ),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="For Save Video or Get Video Components.")],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    def validate_inputs(cls, sizes: Sequence[str] = SIZES[:1]) -> bool | str:
        return one_of(sizes=(sizes[0], SIZES))

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        return lost_videos()

    @classmethod
    def execute(
        cls,
        fps: list[float],
        cross_fade: list[int],
        sizes: list[str],
        clips: Sequence[AnyClip | Tensor] = (),
        audio: Sequence[Mapping] = (),
        **slots: list[AnyClip | Tensor],
    ) -> io.NodeOutput:
        joined: list[AnyClip | Tensor] = []
        names = []
        for name in [*(f"clip_{number}" for number in range(1, SLOTS + 1)), "clips"]:
            here = clips if name == "clips" else slots.get(name) or ()
            for number, part in enumerate(here, 1):
                if part is None:
                    continue
                joined.append(part)
                names.append(name if len(here) == 1 else f"{name}[{number}]")
        if not joined:
            raise SamplingError("there is nothing to join: connect at least one clip or images to Concat Clips")
        if not 0 <= fps[0] < math.inf:  # of a wire: the host looks at widgets only
            raise SamplingError(f"fps is {fps[0]!r}; it must be frames per second, or 0 for the clips' own")
        # Plain images come at the video's speed.
        speed = fps[0] or next((part.fps for part in joined if not isinstance(part, Tensor)), FPS)
        parts = [
            image_clip(name, part, speed) if isinstance(part, Tensor) else part for name, part in zip(names, joined)
        ]
        if len(audio) > 1:
            raise SamplingError(f"audio is a list of {len(audio)} recordings; one for the whole video is expected")
        sound = sound_of(audio[0]) if audio and audio[0] is not None else None
        path = write_video(parts, names, sound, fps[0], cross_fade[0], sizes[0], cls.hidden.unique_id)
        return io.NodeOutput(video_of(path))


class InspectClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_InspectClip",
            display_name="Inspect Clip",
            category=CATEGORY,
            description="Measures whether a clip still looks like its portrait: identity, colours, sharpness and "
            "motion over time, in numbers and as a plot.",
            inputs=[
                io.MultiType.Input("clip", [MemoClip, io.Image], tooltip="A clip, or images of any size."),
                MemoReference.Input("reference", tooltip="The portrait to compare with."),
                MemoModel.Input("model", optional=True, tooltip="Compares faces too, if the checkpoint can find them."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What happens to the clip, in words and numbers."),
                io.Image.Output(display_name="picture", tooltip="The curves over time."),
                io.Float.Output(
                    display_name="identity",
                    tooltip="Mean likeness of the faces, -1 to 1; without face "
                    "models the structural likeness of the pictures, 0 to 1.",
                ),
                io.Float.Output(display_name="colour", tooltip="Mean colour distance (Delta E); under 2 is invisible."),
                io.Float.Output(display_name="sharpness", tooltip="Mean sharpness; 1 is as sharp as the portrait."),
                io.Float.Output(display_name="motion", tooltip="Mean change from frame to frame, in levels of 255."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: AnyClip | Tensor, reference: Reference, model: MemoPipeline | None = None) -> io.NodeOutput:
        from ..memo_core.judging.drawings.quality import draw_quality
        from ..memo_core.judging.quality import measure

        if isinstance(clip, Tensor):
            clip = image_clip("clip", clip)
        analyzer = None if model is None else model.face_analyzer
        found = measure(watched(clip.frames()), reference.pixels, analyzer, reference.face_embedding, fps=clip.fps)
        picture = to_image(draw_quality(found))
        likeness = found.likeness if found.identity is None else found.identity
        means = (float(np.mean(curve)) for curve in (likeness, found.colour, found.sharpness, found.motion))
        return io.NodeOutput(found.summary(), picture, *means, ui=preview(picture, cls))


def image_clip(
    name: str,
    images: Tensor,
    fps: float = FPS,
    start: int = 0,
    sound: Sound | None = None,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> ImageClip:
    """A clip of an IMAGE; SamplingError, with the input's name, for one that cannot be used."""
    try:
        return ImageClip(images.cpu(), start, fps, sound, about)
    except SamplingError as error:
        raise SamplingError(f"{name}: {error}") from error


def watched(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames; stops when the user does."""
    for number, frame in enumerate(frames):
        if number % WINDOW == 0:
            stop_if_interrupted()
        yield frame


def write_video(
    parts: Sequence[AnyClip],
    names: Sequence[str] = ("clip",),
    sound: Sound | None = None,
    fps: float = 0,
    cross_fade: int = 0,
    sizes: str = "refuse",
    node_id: str | None = None,
) -> Path:
    """Encodes clips into a new temporary file. See ConcatClips."""
    from ..memo_core.video.join import join

    height, width = parts[0].size
    for name, part in zip(names, parts):
        if part.size != (height, width) and sizes == SIZES[0]:
            raise ComposeError(
                f"{name} is {part.size[1]}x{part.size[0]} and {names[0]} {width}x{height}: "
                f"set sizes to '{SIZES[1]}', or make them equal before"
            )
        if not fps and part.fps != parts[0].fps:
            raise ComposeError(f"{name} has {part.fps:g} fps and {names[0]} {parts[0].fps:g}: set fps in Concat Clips")
    bar: Progress | None = None

    def on_frames(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or Progress(node_id, total)
        if done:
            bar.update(done)

    fps = fps or parts[0].fps
    return join(
        temporary_video(),
        parts,
        fps=fps,
        sound=sound,
        cross_fade=cross_fade,
        on_frames=on_frames,
        look=stop_if_interrupted,
    )
