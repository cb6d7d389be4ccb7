"""Sampling: a clip from a portrait, a voice and a memory; and all of it in one node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from comfy_api.v0_0_2 import InputImpl, io
from torch import Tensor

from ..memo_core.budget import sampling_budget
from ..memo_core.clips import WINDOW, Clip
from ..memo_core.emotion import EMOTIONS, EmotionTrack
from ..memo_core.errors import SamplingError
from ..memo_core.memory import MemoryState
from ..memo_core.reference import Reference
from ..memo_core.sampling import Job, Window
from ..memo_core.store import WindowStore
from . import host
from .clips import write_video
from .emotion import detect
from .voice import encode_voice
from .wires import CATEGORY, MemoAudio, MemoClip, MemoEmotion, MemoMemory, MemoModel, MemoReference, Voice, one_of

FEELINGS = ("detect", "none", *EMOTIONS)  # of a video made in one node


def _sampling_inputs() -> list[io.Input]:
    return [
        io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps per window of 16 frames."),
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
            tooltip="Of the noise. While it stays the same, windows that were rendered once are not rendered again.",
        ),
    ]


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
                    tooltip="Seconds; 0 is to the end. Clips of whole windows (multiples of 8 s at 30 fps) join to "
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
            ],
            outputs=[
                MemoClip.Output(display_name="clip", tooltip="The frames, not decoded yet, with their sound."),
                MemoMemory.Output(display_name="memory", tooltip="For the clip after this one."),
                io.Float.Output(display_name="end", tooltip="Second at which the clip ends: the next one's start."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: host.HostPipeline,
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
                io.Image.Input("image", tooltip="One picture of a face."),
                io.Audio.Input("audio", tooltip="The recording that is spoken."),
                io.Combo.Input(
                    "emotion",
                    options=list(FEELINGS),
                    default="detect",
                    tooltip="detect: as heard in the voice. none: leave it to the model. Or one for the whole video.",
                ),
                *_sampling_inputs(),
                MemoMemory.Input("memory", optional=True, tooltip="Goes on from an earlier video; without it, anew."),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="With sound; for Save Video."),
                MemoMemory.Output(display_name="memory", tooltip="For Save Memory State, or the next video."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, emotion: str = "detect") -> bool | str:
        return one_of(emotion=(emotion, FEELINGS))

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        return host.lost_videos()

    @classmethod
    def execute(
        cls,
        model: host.HostPipeline,
        image: Tensor,
        audio: dict,
        emotion: str,
        steps: int,
        guidance: float,
        seed: int,
        memory: MemoryState | None = None,
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        reference = model.encode_reference(host.one_picture(image), size=model.default_size, crop="face")
        voice = encode_voice(model, host.sound_of(audio), node_id=node_id)
        if emotion == "detect":
            track, _ = detect(model, voice)
        elif emotion == "none":
            track = None
        else:
            track = EmotionTrack.constant(emotion, voice.track.num_padded_frames, voice.track.fps)
        clip, memory = sample(
            model, reference, voice, track, memory, steps=steps, guidance=guidance, seed=seed, node_id=node_id
        )
        return io.NodeOutput(InputImpl.VideoFromFile(str(write_video([clip], node_id=node_id))), memory)


def sample(
    model: host.HostPipeline,
    reference: Reference,
    voice: Voice,
    emotion: EmotionTrack | None,
    memory: MemoryState | None,
    *,
    start: float = 0.0,
    duration: float = 0.0,
    steps: int,
    guidance: float,
    seed: int,
    stop_on_collapse: bool = False,
    node_id: str | None = None,
) -> tuple[Clip, MemoryState]:
    """See SampleClip."""
    track = voice.track
    first, last = round(start * track.fps), track.num_frames
    if first >= last:
        raise SamplingError(
            f"start is {start:g} s, but the recording ends at {last / track.fps:.2f} s: take out this clip, or lower "
            "start or the duration of the clips before"
        )
    if duration:
        last = min(last, first + max(1, round(duration * track.fps)))
    job = model.job(
        reference,
        track,
        None if emotion is None else emotion.fit(track.fps, track.num_padded_frames),
        memory,
        start=first,
        num_frames=last - first,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
    )
    run = _Run(model, job, host.window_store(), stop_on_collapse, node_id)
    try:
        clip, memory = model.collect(job, run.windows())
    finally:
        model.release()
    return replace(clip, sound=voice.sound), memory


class _Run:
    """One job on the host: says what it will take, refuses what cannot fit, shows progress, survives a full device."""

    def __init__(
        self, model: host.HostPipeline, job: Job, store: WindowStore | None, stop_on_collapse: bool, node_id: str | None
    ):
        self.model, self.job, self.store = model, job, store
        self.stored = model.count_stored(job, store)
        self.progress = host.Progress(node_id, job.windows * job.settings.steps)
        self.windows_done = 0
        self.detector = None
        if stop_on_collapse:
            from ..memo_core.quality import CollapseDetector

            self.detector = CollapseDetector(job.reference.pixels)
        height, width = job.reference.pixels.shape[1:]
        self.budget = sampling_budget(model.nets, height, width, job.settings.guided)
        self.speed_key = f"{model.nets.digest} {model.nets.device} {height}x{width} {job.settings.guided}"

    def windows(self) -> Iterator[Window]:
        """Samples the job; after running out of memory once more, with the rows of a batch one after the other."""
        self._preflight()
        if self.stored < self.job.windows:
            self.model.to_device(self.budget.least)
        rest, row_by_row = self.job, False
        while True:
            try:
                for window in self._sample(rest, row_by_row):
                    yield window
                    frames = rest.start + rest.num_frames - window.start - window.latents.shape[1]
                    if self._collapsed(window) or not frames:
                        return
                    rest = replace(rest, start=window.start + WINDOW, num_frames=frames, memory=window.memory)
                return
            except host.OutOfMemory:
                if row_by_row or not self.job.settings.guided:
                    raise
                host.logger.warning("out of memory: once more, with half the working memory and nothing else loaded")
                row_by_row = True
                self.model.forget()
                self.model.to_device(self.budget.least)

    def _sample(self, job: Job, row_by_row: bool) -> Iterator[Window]:
        steps, total, base = job.settings.steps, self.job.windows, self.windows_done

        def on_progress(done: int, _: int) -> None:
            window, step = divmod(done - 1, steps)
            text = f"window {base + window + 1} of {total}, step {step + 1} of {steps}"
            self.progress.update(base * steps + done, text)

        def should_stop() -> bool:
            host.stop_if_interrupted()
            return False

        began = time.monotonic()
        for window in self.model.sample_windows(
            job, store=self.store, on_progress=on_progress, should_stop=should_stop, row_by_row=row_by_row
        ):
            host.stop_if_interrupted()
            self.windows_done += 1
            if not window.stored:
                host.SpeedBook().put(self.speed_key, (time.monotonic() - began) / steps)
                self.progress.update(self.windows_done * steps, picture=window.frames[-1])
            yield window
            began = time.monotonic()

    def _collapsed(self, window: Window) -> bool:
        reason = None if self.detector is None else self.detector.update(window.frames)
        if reason is not None:
            end = (window.start + window.latents.shape[1]) / self.job.audio.fps
            host.logger.warning("stopped at %.2f s: %s", end, reason)
        return reason is not None

    def _preflight(self) -> None:
        """One line on what is to come; SamplingError for what cannot fit."""
        job, device = self.job, self.model.nets.device
        faces = job.reference.faces_found
        speed = host.SpeedBook().get(self.speed_key)
        left = job.windows - self.stored
        if not left:
            time_needed = "nothing to render"
        elif speed is None:
            time_needed = "time not known before the first window"
        else:
            time_needed = f"about {_duration(speed * job.settings.steps * left)}"
        clip_bytes = 4 * 4 * job.num_frames * job.reference.latents[0, 0].numel()
        ram, gb = host.free_bytes(torch.device("cpu")), 2**30
        on_device = (
            ""
            if device.type == "cpu"
            else (
                f"VRAM {(self.budget.weights + self.budget.least) / gb:.1f} GB needed (at least "
                f"{self.budget.least / gb:.1f}), {host.free_bytes(device) / gb:.1f} free; "
            )
        )
        in_ram = clip_bytes + (self.budget.least if device.type == "cpu" else 0)
        host.logger.info(
            "%.2f s: %d frames in %d windows, %d of them in the store; %s; %sRAM %.1f GB needed, %.1f free; faces "
            "found: %s",
            job.num_frames / job.audio.fps,
            job.num_frames,
            job.windows,
            self.stored,
            time_needed,
            on_device,
            in_ram / gb,
            ram / gb,
            "not looked for" if faces is None else faces,
        )
        if left and self.budget.least > 0.95 * host.total_bytes(device):
            raise SamplingError(self._too_large(host.total_bytes(device)))
        if in_ram > 0.95 * ram:
            seconds = max(1, int(job.num_frames / job.audio.fps * 0.9 * ram / in_ram))
            raise SamplingError(
                f"the clip needs {in_ram / gb:.1f} GB of memory and {ram / gb:.1f} GB are free: make clips of at most "
                f"{seconds} s (duration), one after the other"
            )

    def _too_large(self, room: int) -> str:
        height, width = self.job.reference.pixels.shape[1:]
        fits = [
            (side, guided)
            for side in range(64, max(height, width) + 1, 64)
            for guided in (True, False)
            if sampling_budget(self.model.nets, side, side, guided).least <= 0.95 * room
        ]
        what = [
            f"size {max(side for side, g in fits if g == guided)}{how}"
            for guided, how in _WAYS
            if any(g == guided for _, g in fits)
        ]
        return (
            f"{width}x{height} pixels need {self.budget.least / 2**30:.1f} GB and the device has "
            f"{room / 2**30:.1f} GB. What fits: {' or '.join(what) or 'nothing'} (MEMO Encode Reference: size)"
        )


_WAYS = ((True, ""), (False, " with guidance 1"))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
