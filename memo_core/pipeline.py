"""MemoPipeline: the five calls that turn a portrait and a voice into a talking clip."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import devices
from .budget.placement import OwnPlacement, Placement
from .budget.plan import check_room
from .checkpoint.load import load
from .checkpoint.networks import Networks
from .checks import shown, whole
from .encoders.face import EMBEDDING_SIZE, FaceAnalyzer
from .errors import CheckpointError, PortraitError, SamplingError
from .inputs.emotion import SECONDS_AT_ONCE, EmotionTrack, detect_emotion
from .inputs.portrait import PortraitImage, prepare_portrait
from .inputs.reference import Reference
from .inputs.speech import AudioTrack, encode_audio, seconds_at_once
from .memory.cache import MemoryCache
from .memory.state import MemoryState
from .release import VAE_SCALE
from .running.options import Options
from .sampling.clip import DiffusionRenderer
from .sampling.job import Job
from .sampling.plan import Plan
from .sampling.renderer import Planned, Renderer, Window
from .sampling.settings import PRESETS, Settings, Speed, name_of
from .sampling.store import WindowStore
from .sampling.vae import decode_latents, encode_frames
from .video.clips import Clip, to_uint8
from .video.kept import KeptFrames

logger = logging.getLogger(__name__)
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # torch 2.5, and before


class MemoPipeline:
    """A loaded checkpoint and the calls on it. None of them changes its arguments.

    Create with `from_pretrained`.

    Args:
        nets: the networks.
        placement: makes what has them on the device while they work, of them and of the resident memory.
    """

    def __init__(self, nets: Networks, placement: Callable[[Networks, MemoryCache], Placement] = OwnPlacement):
        self.nets, self._memory = nets, MemoryCache()
        self.placement = placement(nets, self._memory)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] = "toon",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        lora: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]] = (),
        options: Options = Options(),  # noqa: B008 -- it is immutable
    ) -> MemoPipeline:
        """Loads a folder in the released layout, or an embedded checkpoint by name ("toon"). On a GPU the two large
        networks come to it when something is sampled.

        Args:
            lora: adapter files to merge, or pairs of file and strength (1 is as trained); they add up.
            options: how the networks compute; see `running.options.Options`.

        Raises:
            CheckpointError: names the files, or the first ten keys or layers, that do not fit; or an option that the
                device does not allow.
        """
        if isinstance(lora, (str, bytes, os.PathLike)) or not isinstance(lora, Iterable):
            raise CheckpointError(
                f"lora must be a list of files, or of pairs of file and strength, received {shown(lora)}"
            )
        pairs = [file if isinstance(file, (tuple, list)) else (file, 1.0) for file in lora]
        return cls(load(path, device, dtype, lora=pairs, options=options, large_nets_wait=True))

    def encode_audio(
        self,
        waveform: Tensor | np.ndarray,
        sample_rate: int,
        fps: float | None = None,
        context: float | Literal["auto", "local"] | None = "auto",
        **more: Any,
    ) -> AudioTrack:
        """Speech features for every video frame; see `inputs.speech.encode_audio`, also for further arguments.

        Args:
            waveform: [T] or [channels, T], any rate.
            fps: frames a second of the video; None: what the checkpoint was trained at.
            context: None encodes the whole recording at once, as released; "local" makes every feature depend on the
                sound around it alone; a number encodes chunks with that many seconds of context on either side; "auto"
                is None up to 60 s and chunks above.
        """
        self.placement.listen(seconds_at_once(waveform, sample_rate, context))
        return encode_audio(
            waveform,
            sample_rate,
            self.nets.speech_encoder,
            fps=self._fps(fps),
            context=context,
            window_frames=self.nets.window,
            **more,
        )

    def detect_emotion(
        self,
        waveform: Tensor | np.ndarray,
        sample_rate: int,
        num_padded_frames: int,
        fps: float | None = None,
        sensitivity: float = 1.0,
        smoothing: float = 0.0,
    ) -> EmotionTrack:
        """Emotion label of every video frame; see `inputs.emotion.detect_emotion`."""
        self.placement.listen(SECONDS_AT_ONCE)
        return detect_emotion(
            waveform,
            sample_rate,
            self.nets.emotion_encoder,
            self.nets.emotion_head,
            num_padded_frames,
            self._fps(fps),
            sensitivity,
            smoothing,
        )

    def _fps(self, fps: float | None) -> float:
        return self.nets.fps if fps is None else fps

    @cached_property
    def face_analyzer(self) -> FaceAnalyzer | None:
        """The checkpoint's face models; None where it has none, which is logged once unless it is an embedded one."""
        return None if self.nets.embedded else FaceAnalyzer.from_folder(self.nets.folder)

    @torch.no_grad()
    def encode_reference(
        self,
        image: PortraitImage,
        face_embedding: Tensor | np.ndarray | None = None,
        *,
        size: int | tuple[int, int] | None = None,
        crop: Literal["face", "none"] = "none",
        margin: float | None = None,
        face_index: int | None = None,
        face_box: Any = None,
        no_face: Literal["warn", "error"] = "warn",
    ) -> Reference:
        """The portrait as the networks see it; what happens to the picture: `inputs.portrait.prepare_portrait`.

        Args:
            image: float tensor [3, H, W] in [-1, 1], uint8 [H, W, 3], or a PIL image.
            face_embedding: [512] or [1, 512]; None embeds the face with the checkpoint's face models, or zeros without
                them.
            size: side or (height, width) of the video in multiples of 64. None keeps that of a float tensor, whose
                values then pass unchanged if nothing is cropped, and takes the size the checkpoint was trained at for a
                picture.
            crop: "face" crops to the face, "none" to the middle.
            margin: room at each side of the face, in parts of the face's size; None: as in the pictures that the
                checkpoint was trained on, where it says so, else 0.35.
            face_index: which face, 0 for the largest; None takes the largest.
            face_box: where the face is: left, top, right, bottom in pixels, or a mask [H, W].
            no_face: "warn" goes on with a zero embedding, "error" raises.

        Raises:
            PortraitError: wrong shape, range or size (names the nearest allowed sizes), or no face where one was
                demanded.
        """
        if size is None:
            size = self.default_size
            if isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3 and len(image) == 3:
                size = (image.shape[1], image.shape[2])
        given = None if face_embedding is None else _check_face_embedding(face_embedding)
        looks_for_face = given is None or (crop == "face" and face_box is None)
        portrait = prepare_portrait(
            image,
            size,
            crop=crop,
            margin=self.crop_margin if margin is None else margin,
            face_index=face_index,
            analyzer=self.face_analyzer if looks_for_face else None,
            no_face=no_face if looks_for_face else "warn",
            face_box=face_box,
        )
        self.placement.look(*portrait.pixels.shape[1:])
        latents = encode_frames(self.nets.vae, portrait.pixels[None], self.nets.device).cpu()
        faces = portrait.faces_found if looks_for_face and self.face_analyzer is not None else None
        return Reference(portrait.pixels, latents, portrait.face_embedding if given is None else given, faces)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width the checkpoint was trained at."""
        side = VAE_SCALE * self.nets.sample_size
        return side, side

    @property
    def crop_margin(self) -> float:
        """Room at each side of a face in what the checkpoint was trained on, in parts of the face's size."""
        return self.nets.diffusion_net.config.crop_margin

    def job(
        self,
        ref: Reference,
        audio: AudioTrack,
        emotion: EmotionTrack | None = None,
        memory: MemoryState | None = None,
        *,
        start: int = 0,
        num_frames: int | None = None,
        noise: Tensor | None = None,
        **settings: Any,
    ) -> Job:
        """What `sample_clip` would sample; its arguments."""
        unknown = sorted(settings.keys() - Settings.__dataclass_fields__)
        if unknown:
            raise SamplingError(
                f"unknown settings {', '.join(unknown)}; there are {', '.join(Settings.__dataclass_fields__)}"
            )
        return Job(
            reference=ref,
            audio=audio,
            emotion=emotion,
            memory=MemoryState.empty() if memory is None else memory,
            settings=Settings(**settings),
            num_frames=_up_to_the_end(audio, start) if num_frames is None else num_frames,
            start=start,
            noise=noise,
        ).checked(self.nets)

    def _renderer(self) -> Renderer:
        return DiffusionRenderer(self.nets, self._memory, self.decode)

    def count_stored(self, job: Job, store: WindowStore | None, on_window: Callable[[], None] = lambda: None) -> int:
        """How many windows, from the job's first on, need not be sampled because the store has them."""
        _check_types(job, store, on_window=on_window)
        return self._renderer().count_stored(job, store, on_window)

    def sample_windows(
        self,
        job: Job,
        *,
        store: WindowStore | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        plan: Plan | None = None,
    ) -> Iterator[Window]:
        """Hands over each window of frames as soon as it is finished, in constant memory.

        Args:
            job: from `job`.
            store: where finished windows are kept and looked for.
            on_progress: called as (steps done, steps in all).
            should_stop: asked before every step; when true, this ends after the last finished window.
            plan: how to get by with the device's memory; None: `self.plan`, before the first window that is not stored.

        Raises:
            SamplingError: the job does not fit; names what would.
        """
        _check_types(job, store, on_progress=on_progress, should_stop=should_stop)
        if plan is not None and not isinstance(plan, Plan):
            raise SamplingError(f"plan must be None or a budget.Plan, received {shown(plan)}")
        self.placement.stop_listening()
        return self._sample(job, store, on_progress, should_stop, plan)

    def _sample(
        self,
        job: Job,
        store: WindowStore | None,
        on_progress: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool] | None,
        plan: Plan | None,
    ) -> Iterator[Window]:
        """Where the plan is this pipeline's own and the device runs out of memory all the same: once more from that
        window on, by a plan that takes less.
        """
        job = job.checked(self.nets)
        made: list[Plan | None] = []
        rest, steps = job, job.windows * job.settings.steps

        def planned() -> Plan | None:
            made.append(self.plan(rest))
            return made[-1]

        report = None if on_progress is None else partial(_report, on_progress, steps)

        how: Planned = planned if plan is None else plan
        renderer = self._renderer()
        while True:
            try:
                windows = renderer.windows(rest, store=store, on_progress=report, should_stop=should_stop, plan=how)
                while True:
                    with self.placement.computing():
                        window = next(windows, None)
                    if window is None:
                        return
                    yield window
                    rest = _rest(rest, window)
            except RuntimeError as error:
                # MPS has no error of its own for it.
                scarce = isinstance(error, OUT_OF_MEMORY) or "out of memory" in str(error)
                if not scarce or how is not planned or not made:
                    raise
                smaller = None if made[-1] is None else self.smaller_plan(job, made[-1])
                if smaller is None:
                    raise
            # Out here the failed step's tensors are gone.
            logger.warning("out of memory: once more from frame %d on, %s", rest.start, smaller.describe())
            self._memory.clear()
            devices.empty_cache(self.nets.device)
            how = smaller

    def plan(self, job: Job) -> Plan | None:
        """How to sample the job within what is free on the device; None where that is no matter, as on the CPU.

        Raises:
            SamplingError: it does not fit; names what would.
        """
        _check_types(job)
        return self.placement.plan(job)

    def smaller_plan(self, job: Job, than: Plan) -> Plan | None:
        """The next plan that takes less; None after the last."""
        return self.placement.smaller_plan(job, than)

    def check_room(self, size: tuple[int, int] | None = None, **settings: Any) -> None:
        """Refuses, before anything is computed at it, a size that cannot be sampled with the memory there is: the
        device's, or the machine's where the CPU samples. Takes a second or two, once per checkpoint.

        Args:
            size: height and width of the video; None: `default_size`.
            settings: those of `sampling.settings.Settings` that will be sampled with; guidance and speed matter.

        Raises:
            SamplingError: it does not fit; names the largest size that does.
        """
        height, width = self.default_size if size is None else size
        check_room(
            self.nets,
            height,
            width,
            Settings(**settings).for_checkpoint(self.nets.diffusion_net.config),
            kept=self._memory.nbytes,
        )

    def sample_clip(
        self,
        ref: Reference,
        audio: AudioTrack,
        emotion: EmotionTrack | None = None,
        memory: MemoryState | None = None,
        *,
        start: int = 0,
        num_frames: int | None = None,
        steps: int = 20,
        guidance_scale: float = 3.5,
        seed: int = 42,
        noise: Tensor | None = None,
        emotion_per: Literal["window", "frame"] = "window",
        face_token_rows: Literal["released", "grouped"] | None = None,
        speed: str | Speed = "exact",
        store: WindowStore | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> tuple[Clip, MemoryState]:
        """Samples frames [start, start + num_frames) of the audio.

        Args:
            ref, audio, emotion: from the three calls above; without an emotion track the null emotion is used.
            memory: what came before; None is a new video.
            start, num_frames: in frames; None for up to the audio's end.
            steps, guidance_scale, seed, emotion_per, face_token_rows: see `sampling.settings.Settings`.
            speed: "exact", "balanced" or "draft", or a bundle of one's own; see `sampling.settings.Speed`.
            noise: [windows, 4, F, h, w] instead of the seeded noise.
            store: where finished windows are kept, so that none is sampled twice.
            on_progress: called as (steps done, steps in all).
            should_stop: asked before every step; when true, the clip ends after the last finished window.

        Returns:
            The clip, and the memory to go on with.

        Raises:
            SamplingError: arguments out of range. MemoryStateError: a memory of another checkpoint or reference.
        """
        job = self.job(
            ref,
            audio,
            emotion,
            memory,
            start=start,
            num_frames=num_frames,
            noise=noise,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            emotion_per=emotion_per,
            face_token_rows=face_token_rows,
            speed=speed,
        )
        windows = self.sample_windows(job, store=store, on_progress=on_progress, should_stop=should_stop)
        return self.collect(job, windows)

    def collect(self, job: Job, windows: Iterable[Window], kept: KeptFrames | None = None) -> tuple[Clip, MemoryState]:
        """The clip made of a job's windows, and the memory after them: the job's own, should there be no window.

        Args:
            job: from `job`.
            windows: from `sample_windows`.
            kept: where their frames are kept, as far as sampling has decoded them.
        """
        _check_types(job)
        latents, done, memory = torch.empty(4, job.num_frames, *job.reference.latents.shape[2:]), 0, job.memory
        for number, window in enumerate(windows):
            if kept is not None and window.decoded is not None:
                kept.put(number, to_uint8(window.decoded))
            latents[:, done : done + window.latents.shape[1]] = window.latents
            done, memory = done + window.latents.shape[1], window.memory
        settings = job.settings
        about = {
            "model": self.nets.title,
            "seed": settings.seed,
            "steps": settings.steps,
            "guidance": settings.guidance_scale,
        }
        if settings.speed != PRESETS["exact"]:
            about["speed"] = name_of(settings.speed)
        stopped = done < job.num_frames
        clip = Clip(
            latents[:, :done],
            job.start,
            job.audio.fps,
            self.decode,
            stopped=stopped,
            about=about,
            window=self.nets.window,
            kept=kept,
        )
        return clip, memory

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [4, F, h, w] -> frames [F, 3, H, W] in [0, 1]."""
        shape = list(latents.shape) if isinstance(latents, Tensor) else shown(latents)
        if not isinstance(latents, Tensor) or latents.ndim != 4 or len(latents) != 4 or 0 in latents.shape:
            raise SamplingError(f"latents are [4, F, h, w], received {shape}")
        if not latents.is_floating_point() or latents.itemsize == 1:
            raise SamplingError(f"latents are floating-point numbers, received {latents.dtype}")
        self.placement.look(*(VAE_SCALE * side for side in latents.shape[2:]))
        options = self.nets.options
        on_threads = options is not None and options.rows_on_threads
        return decode_latents(self.nets.vae, latents, self.nets.device, on_threads=on_threads)


def _rest(job: Job, window: Window) -> Job:
    """What is left of a job after one of its windows; the job itself after its last."""
    done = window.latents.shape[1]
    if done >= job.num_frames:
        return job
    noise = None if job.noise is None else job.noise[1:]
    left = job.num_frames - done
    return replace(job, noise=noise, start=window.start + done, num_frames=left, memory=window.memory)


def _report(on_progress: Callable[[int, int], None], steps: int, done: int, total: int) -> None:
    """Progress of what is left of a job as that of the whole job, of so many steps."""
    on_progress(steps - total + done, steps)


def _up_to_the_end(audio: AudioTrack, start: int) -> int:
    """Frames from `start` on; of what is no track or no frame of it one, for `Job.checked` to refuse the rest."""
    there = isinstance(audio, AudioTrack) and whole(start, 0, audio.num_frames - 1) is not None
    return audio.num_frames - start if there else 1


def _check_types(job: Job, store: WindowStore | None = None, **functions: Any) -> None:
    if not isinstance(job, Job):
        raise SamplingError(f"a job is what MemoPipeline.job makes, received {shown(job)}")
    if store is not None and not isinstance(store, WindowStore):
        raise SamplingError(f"store must be None or a WindowStore, received {shown(store)}")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise SamplingError(f"{name} must be None or a function, received {shown(function)}")


def _check_face_embedding(embedding: Tensor | np.ndarray) -> Tensor:
    try:
        embedding = torch.as_tensor(embedding)
    except Exception as error:  # whatever torch says of a value that is no array of numbers
        raise PortraitError(f"a face embedding is {EMBEDDING_SIZE} numbers, received {shown(embedding)}") from error
    if embedding.is_complex() or embedding.dtype == torch.bool or embedding.is_quantized:
        raise PortraitError(f"a face embedding is {EMBEDDING_SIZE} numbers, received {embedding.dtype}")
    embedding = embedding.detach().to("cpu", torch.float32, copy=True)
    finite = bool(torch.isfinite(embedding).all())
    if embedding.shape not in ((EMBEDDING_SIZE,), (1, EMBEDDING_SIZE)) or not finite:
        raise PortraitError(
            f"a face embedding is {EMBEDDING_SIZE} finite numbers, [{EMBEDDING_SIZE}] or [1, {EMBEDDING_SIZE}]; "
            f"received {list(embedding.shape)}{'' if finite else ' with NaN or infinite values'}"
        )
    return embedding.reshape(1, -1)
