"""Sampling a clip on the host: says what it will take, shows progress, takes from the store, survives a full device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..memo_core.errors import SamplingError
from ..memo_core.inputs.emotion import EmotionTrack
from ..memo_core.inputs.reference import Reference
from ..memo_core.memory.state import MemoryState
from ..memo_core.pipeline import MemoPipeline
from ..memo_core.sampling.job import Job
from ..memo_core.sampling.plan import Plan
from ..memo_core.sampling.renderer import Window
from ..memo_core.sampling.store import WindowStore
from ..memo_core.video.clips import Clip
from ..memo_core.video.kept import KeptFrames
from .host.folders import temporary_folder, window_store
from .host.placement import free_bytes, placement_of
from .host.progress import OutOfMemory, Progress, SpeedBook, logger, stop_if_interrupted
from .wires import Voice


def sample(
    model: MemoPipeline,
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
    speed: str,
    stop_on_collapse: bool = False,
    node_id: str | None = None,
) -> tuple[Clip, MemoryState]:
    """The clip of a span of the voice, and the memory after it. See the node MEMO Sample Clip."""
    track = voice.track
    for name, seconds in (("start", start), ("duration", duration)):  # of a wire: the host looks at widgets only
        if not math.isfinite(seconds):
            raise SamplingError(f"{name} is {seconds!r}; it must be a number of seconds")
    first, last = round(start * track.fps), track.num_frames
    if first >= last:
        raise SamplingError(
            f"start is {start:g} s, but the recording ends at {last / track.fps:.2f} s: take out this clip, or lower "
            "start or the duration of the clips before"
        )
    if duration:
        wanted = first + max(1, round(duration * track.fps))
        if wanted > last:
            logger.info("the recording ends at %.2f s: the clip is as long as it lasts", last / track.fps)
        last = min(last, wanted)
    recorded = track.num_padded_frames / track.fps
    if emotion is not None and abs(emotion.seconds - recorded) > model.nets.window / min(track.fps, emotion.fps) + 0.1:
        raise SamplingError(
            f"the emotions last {emotion.seconds:.1f} s and the recording {recorded:.1f} s: make both from the same one"
        )
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
        speed=speed,
    )
    run = _Run(model, job, window_store(), stop_on_collapse, node_id)
    try:
        clip, memory = model.collect(job, run.windows(), KeptFrames(temporary_folder()))
    finally:
        run.remember_speed()
        placement_of(model).release()
    return replace(clip, sound=voice.sound), memory


class _Run:
    """One job on the host."""

    def __init__(
        self, model: MemoPipeline, job: Job, store: WindowStore | None, stop_on_collapse: bool, node_id: str | None
    ):
        self.model, self.job, self.store = model, job, store
        self.stored = model.count_stored(job, store, stop_if_interrupted)
        self.progress = Progress(node_id, job.windows * job.settings.steps)
        self.windows_done, self.sampled, self.spent = 0, 0, 0.0
        self.detector = None
        if stop_on_collapse:
            from ..memo_core.judging.collapse import CollapseDetector

            self.detector = CollapseDetector(job.reference.pixels)
        height, width = job.reference.pixels.shape[1:]
        how = f"{job.settings.guided} {job.settings.speed}"
        self.speed_key = f"{model.nets.digest} {model.nets.device} {height}x{width} {how}"
        self.known_speed = SpeedBook().get(self.speed_key)

    def windows(self) -> Iterator[Window]:
        """Samples the job; after running out of memory once more, by a plan that takes less."""
        plan = self._preflight()
        rest, again = self.job, False
        while True:
            try:
                if again:
                    placement_of(self.model).forget()
                if plan is not None:
                    placement_of(self.model).to_device(plan.peak - plan.weights)
                for window in self._sample(rest, plan):
                    yield window
                    frames = rest.start + rest.num_frames - window.start - window.latents.shape[1]
                    if self._collapsed(window) or not frames:
                        return
                    rest = replace(
                        rest, start=window.start + window.latents.shape[1], num_frames=frames, memory=window.memory
                    )
                return
            except OutOfMemory:
                smaller = None if plan is None else self.model.smaller_plan(self.job, plan)
                if smaller is None and again:
                    raise
                plan = smaller or plan
            # Out here the failed step's tensors are gone.
            how = "as before" if plan is None else plan.describe()
            logger.warning("out of memory: once more, with nothing else loaded, %s", how)
            again = True

    def _sample(self, job: Job, plan: Plan | None) -> Iterator[Window]:
        steps, total, base = job.settings.steps, self.job.windows, self.windows_done

        def on_progress(done: int, _: int) -> None:
            window, step = divmod(done - 1, steps)
            text = f"window {base + window + 1} of {total}, step {step + 1} of {steps}"
            self.progress.update(base * steps + done, text)

        def should_stop() -> bool:
            stop_if_interrupted()
            return False

        began = time.monotonic()
        for window in self.model.sample_windows(
            job, store=self.store, on_progress=on_progress, should_stop=should_stop, plan=plan
        ):
            stop_if_interrupted()
            self.windows_done += 1
            if not window.stored:
                self.sampled, self.spent = self.sampled + 1, self.spent + time.monotonic() - began
                if self.sampled == 1 and self.windows_done < total and not self.known_speed:
                    logger.info("about %s for the rest", _duration(self.spent * (total - self.windows_done)))
            if not window.stored or self.windows_done == total:
                self.progress.update(self.windows_done * steps, picture=window.frames[-1])
            yield window
            began = time.monotonic()

    def remember_speed(self) -> None:
        if self.sampled:
            SpeedBook().put(self.speed_key, self.spent / self.sampled / self.job.settings.steps)

    def _collapsed(self, window: Window) -> bool:
        reason = None if self.detector is None else self.detector.update(window.frames)
        if reason is not None:
            end = (window.start + window.latents.shape[1]) / self.job.audio.fps
            logger.warning("stopped at %.2f s: %s", end, reason)
        return reason is not None

    def _preflight(self) -> Plan | None:
        """One line on what is to come; SamplingError for what cannot fit. Returns how to sample, if anything is."""
        job, device = self.job, self.model.nets.device
        faces = job.reference.faces_found
        speed = self.known_speed
        left = job.windows - self.stored
        if not left:
            time_needed = "nothing to render"
        elif speed is None:
            time_needed = "time not known before the first window"
        else:
            time_needed = f"about {_duration(speed * job.settings.steps * left)}"
        clip_bytes = 4 * 4 * job.num_frames * job.reference.latents[0, 0].numel()
        ram, gb = free_bytes(torch.device("cpu")), 2**30
        plan, on_device, fixed = None, "", 0
        if left:
            try:
                plan = self.model.plan(job)
            except SamplingError as error:
                raise SamplingError(f"{error} (MEMO Encode Reference: size)") from error
        if plan is not None and device.type == "cpu":
            fixed = plan.peak
        elif plan is not None:
            on_device = f"VRAM {plan.peak / gb:.1f} GB needed, {free_bytes(device) / gb:.1f} free: "
            on_device += f"{plan.describe()}; "
            fixed = plan.on_host
        in_ram = clip_bytes + fixed
        logger.info(
            "%.2f s: %d frames in %d windows, %d of them in the store%s; %s; %sRAM %.1f GB needed, %.1f free; faces "
            "found: %s",
            job.num_frames / job.audio.fps,
            job.num_frames,
            job.windows,
            self.stored,
            " (it is off)" if self.store is None else "",
            time_needed,
            on_device,
            in_ram / gb,
            ram / gb,
            "not looked for, there are no face models" if faces is None else faces,
        )
        if in_ram > 0.95 * ram:
            if fixed > 0.9 * ram:
                raise SamplingError(
                    f"{fixed / gb:.1f} GB of host memory are needed besides the device's, and {ram / gb:.1f} GB are "
                    "free: close other programs, or choose a smaller size (MEMO Encode Reference) or guidance 1"
                )
            seconds = max(1, int(job.num_frames / job.audio.fps * 0.9 * (ram - fixed) / clip_bytes))
            raise SamplingError(
                f"the clip needs {in_ram / gb:.1f} GB of memory and {ram / gb:.1f} GB are free: make clips of at most "
                f"{seconds} s (duration), one after the other"
            )
        return plan


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
