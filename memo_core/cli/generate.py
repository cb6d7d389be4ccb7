"""`memo generate`: a portrait and a voice in, a video out."""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MemoError
from .arguments import add_checkpoint, duration, positive_int, seconds, size
from .output import INTERRUPTED, OK, check_output, named_after, say

if TYPE_CHECKING:
    import torch

    from ..memory.state import MemoryState
    from ..sampling.renderer import Window
    from ..sampling.store import WindowStore
    from ..video.write import VideoWriter


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """What the command takes."""

    def add(name: str, text: str, **more: Any) -> None:
        sub.add_argument(name, help=text, **more)

    add("portrait", "a picture of a face", metavar="PORTRAIT")
    add("voice", "any file with sound, also a video", metavar="VOICE")
    sub.add_argument("-o", "--output", metavar="OUT.mp4", help="the video (default: VOICE.mp4, here)")
    add_checkpoint(sub)
    add(
        "--lora",
        "an adapter to merge into the checkpoint, and how much of it (default: 1); several add up",
        type=_adapter,
        action="append",
        metavar="FILE[:STRENGTH]",
    )
    add("--steps", "sampling steps per window (default: %(default)s)", type=int, default=20)
    add("--guidance", "guidance scale; 1 is none, in half the time (default: %(default)s)", type=float, default=3.5)
    add("--seed", "of the noise (default: %(default)s)", type=int, default=42)
    add(
        "--speed",
        "balanced renders faster, in at most 10 steps, draft fastest, in 6; their frames differ from the exact ones "
        "(default: %(default)s)",
        choices=("exact", "balanced", "draft"),
        default="exact",
    )
    add("--emotion", "detect, null (none), or one by name: happy, sad, ... (default: %(default)s)", default="detect")
    add("--size", "pixels, multiples of 64 (default: as trained)", type=size, metavar="N|WxH")
    add("--crop", "around the face, or the middle (default: %(default)s)", choices=("face", "none"), default="face")
    add("--face", "which face, 0 is the largest (default: the largest)", type=int, metavar="N")
    add("--require-face", "stop where no face is found, rather than go on without one", action="store_true")
    add(
        "--context",
        "how much sound around each part it is heard in; local keeps what comes before an edit as it is; auto is whole "
        "up to a minute (default: auto)",
        type=_context,
        default="auto",
        metavar="auto|whole|local|SECONDS",
    )
    add("--separate-vocals", "let the voice alone drive the face, without music (audio-separator)", action="store_true")
    add("--start", "begin here in VOICE (default: 0)", type=seconds, default=0.0, metavar="SECONDS")
    add("--duration", "make this much (default: all to the end)", type=duration, metavar="SECONDS")
    add("--memory-in", "go on from this memory state", metavar="STATE")
    add("--memory-out", "save the memory state after the last frame", metavar="STATE")
    add("--horizon", "remember only the last N windows (default: all the past)", type=positive_int, metavar="N")
    add(
        "--store",
        "keep finished windows here and never make the same one twice (default: ComfyUI's, inside of it; else 10 GB in "
        "the user's cache)",
        metavar="FOLDER",
    )
    add("--no-store", "neither keep nor look for finished windows", action="store_true")
    add("--device", "auto, cpu, cuda, cuda:1, ... (default: %(default)s)", default="auto")
    add(
        "--dtype",
        "auto is bfloat16 on cuda (float16 on old cards), else float32 (default: %(default)s)",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    output = _output(args)

    from ..checkpoint.layout import VOCAL_SEPARATOR, find
    from ..checkpoint.lora import read
    from ..checkpoint.settings import read_net_config
    from ..inputs.emotion import EmotionTrack
    from ..inputs.pictures import open_picture
    from ..inputs.portrait import check_size
    from ..inputs.recording import Recording
    from ..inputs.separation import separate_vocals
    from ..inputs.speech import count_frames
    from ..memory.state import MemoryState
    from ..pipeline import MemoPipeline
    from ..release import SAMPLE_RATE
    from ..running.options import Options
    from ..sampling.job import check_memory
    from ..sampling.settings import Settings
    from ..video.write import VideoWriter

    # What can be found wrong without the networks, before they are loaded.
    settings = Settings(steps=args.steps, guidance_scale=args.guidance, seed=args.seed, speed=args.speed)
    args.emotion = _emotion(args.emotion)
    if args.size is not None:
        check_size(args.size)
    memory = MemoryState.load(args.memory_in) if args.memory_in else MemoryState.empty(args.horizon)
    store = None if args.no_store else _store(args.store)
    portrait = open_picture(args.portrait)
    recording = Recording(args.voice)
    waveform, rate = recording.mono(SAMPLE_RATE), SAMPLE_RATE  # an hour as it was recorded may not fit into memory
    adapters = [read(file).config for file, strength in args.lora or () if strength]
    fps = read_net_config(find(args.checkpoint) / "diffusion_net").following(adapters).fps
    num_frames = count_frames(recording.num_samples, recording.sample_rate, fps)
    start, count = _span(args, num_frames, recording.seconds, fps)
    device, dtype = _device(args)

    options = Options(rows_on_threads=device.type == "cpu")
    pipe = MemoPipeline.from_pretrained(args.checkpoint, device, dtype, lora=args.lora or (), options=options)
    settings = settings.for_checkpoint(pipe.nets.diffusion_net.config)  # what will be rendered, which the video says
    if args.size is not None:
        pipe.check_room(args.size, guidance_scale=settings.guidance_scale, speed=settings.speed)
    reference = pipe.encode_reference(
        portrait,
        size=args.size,
        crop=args.crop,
        face_index=args.face,
        no_face="error" if args.require_face or args.face is not None else "warn",
    )
    check_memory(memory, pipe.nets, reference)  # before the voice, which may take minutes
    height, width = reference.pixels.shape[1:]
    about = {
        "model": pipe.nets.title,
        "seed": args.seed,
        "steps": settings.steps,
        "guidance": settings.guidance_scale,
        "emotion": args.emotion,
    }
    if args.speed != "exact":
        about["speed"] = args.speed
    with VideoWriter(output, width, height, fps, recording.sample_rate, about) as writer:
        sound = (round(frame * recording.sample_rate / fps) for frame in (start, start + count))
        writer.write_audio(_begun(recording.span(*sound)))
        if args.separate_vocals:
            separator = pipe.nets.folder / VOCAL_SEPARATOR
            waveform, rate = separate_vocals(recording.read(), recording.sample_rate, separator)
        context = None if args.context == "whole" else args.context
        audio = pipe.encode_audio(waveform, rate, fps, context, num_frames=num_frames)
        emotion: EmotionTrack | None = None
        if args.emotion == "detect":
            emotion = pipe.detect_emotion(waveform, rate, audio.num_padded_frames, fps)
        elif args.emotion != "null":
            emotion = EmotionTrack.constant(args.emotion, audio.num_padded_frames, fps)
        del waveform
        with _Bar(count) as bar:
            job = pipe.job(
                reference,
                audio,
                emotion,
                memory,
                start=start,
                num_frames=count,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                seed=settings.seed,
                speed=settings.speed,
            )
            windows = pipe.sample_windows(job, store=store, on_progress=bar.steps)
            memory, stopped, stored = _write(windows, writer, memory, beside=device.type != "cpu")
    if stopped is not None and writer.frames_written < count:
        return _stopped(args, writer, memory, start, fps, stopped)
    if isinstance(stopped, Exception):
        raise stopped
    if args.memory_out:
        memory.save(args.memory_out)
    found = f", {stored} of {job.windows} windows from the store" if stored else ""
    print(f"{output}: {count} frames, {count / fps:.2f} s, {width}x{height}, {count / bar.seconds:.2f} frames/s{found}")
    return OK


def _output(args: argparse.Namespace) -> Path:
    """The video; MemoError where files cannot be written, would replace others, or do not go together."""
    output = Path(args.output or named_after(args.voice, ".mp4"))
    adapters = [file for file, _ in args.lora or ()]
    check_output(output, "-o", args.portrait, args.voice, args.memory_in, args.memory_out, *adapters)
    check_output(args.memory_out, "--memory-out", args.portrait, args.voice, *adapters)
    if output.suffix.lower() not in (".mp4", ".m4v"):
        raise MemoError(f"{output} does not end in .mp4; only MP4 is written")
    if args.memory_in and args.horizon:
        raise MemoError("--horizon is for a new video; the state given with --memory-in brings its own")
    return output


def _emotion(name: str) -> str:
    """What --emotion says: detect, null, or the name of an emotion."""
    from ..inputs.emotion import emotion_index
    from ..release import EMOTIONS

    if name == "none":  # as the nodes call it
        return "null"
    if name in [str(index) for index in range(len(EMOTIONS))]:
        return EMOTIONS[int(name)]
    if name not in ("detect", "null"):
        try:
            emotion_index(name)
        except MemoError as error:
            raise MemoError(f"--emotion may be detect, null (or none), or one by name: {error}") from error
    return name


def _begun(pieces: Iterator[Any]) -> Iterator[Any]:
    """The same, after the first piece was asked for: the file is open now, and may be moved while the video is made."""
    first = next(pieces, None)

    def whole() -> Iterator[Any]:
        if first is not None:
            yield first
        yield from pieces

    return whole()


def _write(
    windows: Iterator[Window], writer: VideoWriter, memory: MemoryState, beside: bool = False
) -> tuple[MemoryState, BaseException | None, int]:
    """Writes window after window and ends the file, after Ctrl-C or an error with what there is.

    Args:
        beside: a window is encoded while the next one is sampled: on a device of its own that would idle, and here
            would only lose processor time.

    Returns the memory after the last window in the file, what stopped it early, and how many windows were in the store.
    """
    from ..video.clips import to_uint8

    ends, stopped, stored = [(0, memory)], None, 0  # frames up to a window's end, and the memory there
    try:
        for window in windows:
            frames = to_uint8(window.frames)
            ends = [*ends[-2:], (ends[-1][0] + len(frames), window.memory)]
            stored += window.stored
            writer.write_frames(frames, wait=not beside)
    except (KeyboardInterrupt, Exception) as reason:
        stopped = reason
    with _uninterrupted():
        if stopped is not None and not isinstance(stopped, KeyboardInterrupt) and writer.path.exists():
            writer.path = writer.path.with_stem(f"{writer.path.stem}-partial")  # an older video stays as it was
        writer.finish(partial=stopped is not None)
    # Only the writer knows whether the interrupt came before or after it took the last window.
    return next(state for end, state in reversed(ends) if end <= writer.frames_written), stopped, stored


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C has no effect inside: closing a file takes a moment, and half of it is no use to anyone."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(
    args: argparse.Namespace, writer: VideoWriter, memory: MemoryState, start: int, fps: int, reason: BaseException
) -> int:
    """Saves the memory after Ctrl-C or an error, and says what there is and how to go on; then raises the error."""
    done = writer.frames_written
    if not done:
        if not isinstance(reason, KeyboardInterrupt):
            raise reason
        say("interrupted before the first frames were finished; no file was written")
        return INTERRUPTED
    state = args.memory_out or str(writer.path.with_suffix(".memory.safetensors"))
    memory.save(state)
    changes = {"start": (start + done) / fps, "memory_in": state, "horizon": None, "memory_out": args.memory_out}
    changes["output"] = str(writer.path.with_stem(f"{writer.path.stem}-rest"))
    if args.duration is not None:
        changes["duration"] = args.duration - done / fps
    holds = f"{writer.path} holds the first {done} frames ({done / fps:.2f} s)"
    say(f"interrupted: {holds}. To go on: {_command(args, changes)}")
    if not isinstance(reason, KeyboardInterrupt):
        raise reason
    return INTERRUPTED


def _command(args: argparse.Namespace, changes: dict[str, object]) -> str:
    """The command line of `memo generate` with these arguments, some of them changed."""
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    words = ["memo", "generate", args.portrait, args.voice]
    for name, value in (vars(args) | changes).items():
        if name in ("portrait", "voice", "run") or value == defaults.get_default(name):
            continue
        if name == "lora":
            words += [word for file, strength in value for word in ("--lora", f"{file}:{strength!r}")]
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, tuple):
            value = f"{value[1]}x{value[0]}"
        if isinstance(value, float):
            value = f"{value:.6f}".rstrip("0").rstrip(".")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def _span(args: argparse.Namespace, end: int, seconds: float, fps: int) -> tuple[int, int]:
    """First frame and number of frames, within a recording of `end` frames, so many seconds at `fps`."""
    start = round(args.start * fps)
    if start >= end:
        raise MemoError(f"--start is {args.start:g} s, but {args.voice} lasts {seconds:.2f} s")
    count = end - start
    if args.duration is not None:
        count = min(count, max(1, round(args.duration * fps)))
    return start, count


def _store(folder: str | None) -> WindowStore | None:
    """The store at `folder`; by default ComfyUI's, when this is one of its custom nodes, or one in the user's cache."""
    from ..sampling.store import WindowStore, allowed_bytes

    if folder is not None:
        return WindowStore(folder, allowed_bytes())
    here = Path(__file__).resolve().parents[1:]
    inside = len(here) > 3 and here[2].name == "custom_nodes"
    return WindowStore.default(here[3] / "user" / "memo" / "windows" if inside else None)


def _device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    import torch

    from .. import devices

    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MemoError(f"--device is {args.device!r}; allowed are auto, cpu, cuda, cuda:0, ...") from error
    # What torch has a name for need not be there; on `meta` nothing is ever computed.
    counted = getattr(getattr(torch, device.type, None), "device_count", lambda: 0)
    count = 1 if device.type == "cpu" else counted()
    if (device.index or 0) >= count:
        seen = f"torch {torch.__version__} sees {count} devices of that kind"
        raise MemoError(f"--device is {args.device!r}, but {seen}; allowed are auto, cpu, cuda, cuda:0, ...")
    dtype = args.dtype
    if dtype == "auto":
        return device, devices.of(device).dtype
    return device, getattr(torch, dtype)


class _Bar:
    """Progress in frames, with frames per second and the time left; nothing where no one watches."""

    def __init__(self, frames: int) -> None:
        from tqdm import tqdm

        layout = "{percentage:3.0f}% |{bar}| {n:.0f}/{total} frames, {rate_noinv_fmt}, {remaining} left"
        self._frames = frames
        self._started = time.monotonic()
        self._bar = tqdm(total=frames, unit=" frames", bar_format=layout, smoothing=0.1, disable=None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def steps(self, done: int, total: int) -> None:
        self._bar.update(self._frames * done / total - self._bar.n)


def _adapter(text: str) -> tuple[str, float]:
    """File and strength from "FILE" or "FILE:STRENGTH"."""
    file, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:
        file, value = text, 1.0  # the colon, if any, belongs to the name, as in C:\face.safetensors
    if not file or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE or FILE:STRENGTH with a finite number")
    return file, value


def _context(text: str) -> float | str:
    return text if text in ("auto", "whole", "local") else seconds(text)
