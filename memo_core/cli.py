"""The `memo` command."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import MemoError
from .files import replace_whole

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from .memory import MemoryState
    from .sampling import Window
    from .store import WindowStore
    from .video import VideoWriter

FPS = 30  # the rate MEMO was trained at
OK, FAILED, INTERRUPTED = 0, 1, 130  # exit codes; argparse adds 2 for wrong usage


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the given arguments (None: the process's) and returns the exit code.

    0 when all is done, 1 after an error (one line on stderr says which), 2 for wrong usage, 130 after Ctrl-C or a
    SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what no text can
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="memo: %(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _prepare_allocator()
    parser = build_parser()
    if threading.current_thread() is threading.main_thread():
        # A stopped job keeps what it has, as with Ctrl-C; so does one whose terminal was closed, unless it runs on.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, to their programmers
            return args.run(args)
    except KeyboardInterrupt:
        _say("interrupted; no file was written")
        return INTERRUPTED
    except MemoryError:
        return _fail("out of memory: try a smaller --size or a shorter --duration")
    except MemoError as error:
        return _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return _fail("out of memory: try a smaller --size, or --dtype bfloat16")


def _prepare_allocator() -> None:
    """Has torch grow its pieces of GPU memory instead of making new ones, before it starts: less is lost between them.
    Not on Windows, which cannot; not where someone has chosen."""
    from importlib.metadata import PackageNotFoundError, version

    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9, and before
    if sys.platform == "win32" or any(name in os.environ for name in names):
        return
    try:
        major, minor = (int(part) for part in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return
    os.environ[names[(major, minor) < (2, 9)]] = "expandable_segments:True"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, without all that would be right."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    about = "A portrait and a voice in, a talking video out."
    parser = _Parser("memo", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"memo {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    text = "Make a video of PORTRAIT speaking VOICE. Ctrl-C keeps what is finished and says how to go on."
    _add_generate(command("generate", generate, text))

    sub = command("emotion", detect, "Print the emotions heard in VOICE and draw them.")
    sub.add_argument("voice", metavar="VOICE", help="any file with sound")
    sub.add_argument("-o", "--output", metavar="PNG", help="the picture (default: VOICE.emotion.png, here)")
    _add_checkpoint(sub)

    sub = command("info", info, "Describe a checkpoint folder, an adapter file or a memory state file.")
    text = "a folder or an embedded checkpoint's name; a file; with --budget also `released`, which needs no weights"
    sub.add_argument("target", metavar="CHECKPOINT|LORA|STATE", help=text)
    text = (
        "print what sampling takes on a GPU in bfloat16, and how it gets by on a card of so many GB (default: cards of "
        "12 and 8 GB, and the one in this machine)"
    )
    sub.add_argument("--budget", type=_gigabytes, nargs="?", const=0.0, metavar="GB", help=text)
    text = "pixels, multiples of 64, for --budget (default: as trained)"
    sub.add_argument("--size", type=_size, metavar="N|WxH", help=text)

    sub = command("sheet", sheet, "Draw evenly spaced frames of VIDEO, with their times, as one picture.")
    sub.add_argument("video", metavar="VIDEO")
    sub.add_argument("-o", "--output", metavar="PNG", help="the picture (default: VIDEO.png, here)")
    sub.add_argument("--frames", type=_positive_int, default=12, help="how many frames (default: %(default)s)")
    sub.add_argument("--columns", type=_positive_int, default=4, help="how many side by side (default: %(default)s)")

    text = "Print the licences of the released weights and fetch them (13 GB) into FOLDER. Called again it goes on."
    sub = command("download", download, text)
    sub.add_argument("folder", metavar="FOLDER", nargs="?", default="memo-weights", help="(default: %(default)s, here)")
    sub.add_argument("--only", metavar="PART", nargs="+", help="fetch these parts, named as in the licences")
    return parser


def _add_checkpoint(sub: argparse.ArgumentParser) -> None:
    text = "folder in the released layout, or the name of an embedded checkpoint (default: %(default)s)"
    sub.add_argument("--checkpoint", default="toon", help=text)


def _add_generate(sub: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **more: Any) -> None:
        sub.add_argument(name, help=text, **more)

    add("portrait", "a picture of a face", metavar="PORTRAIT")
    add("voice", "any file with sound, also a video", metavar="VOICE")
    sub.add_argument("-o", "--output", metavar="OUT.mp4", help="the video (default: VOICE.mp4, here)")
    _add_checkpoint(sub)
    add(
        "--lora",
        "an adapter to merge into the checkpoint, and how much of it (default: 1); several add up",
        type=_adapter,
        action="append",
        metavar="FILE[:STRENGTH]",
    )
    add("--steps", "sampling steps per window of 16 frames (default: %(default)s)", type=int, default=20)
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
    add("--size", "pixels, multiples of 64 (default: as trained)", type=_size, metavar="N|WxH")
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
    add("--start", "begin here in VOICE (default: 0)", type=_seconds, default=0.0, metavar="SECONDS")
    add("--duration", "make this much (default: all to the end)", type=_seconds, metavar="SECONDS")
    add("--memory-in", "go on from this memory state", metavar="STATE")
    add("--memory-out", "save the memory state after the last frame", metavar="STATE")
    add("--horizon", "remember only the last N windows (default: all the past)", type=_positive_int, metavar="N")
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


# --- memo generate ----------------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    output = Path(args.output or _named_after(args.voice, ".mp4"))
    adapters = [file for file, _ in args.lora or ()]
    _check_output(output, "-o", args.portrait, args.voice, args.memory_in, args.memory_out, *adapters)
    _check_output(args.memory_out, "--memory-out", args.portrait, args.voice, *adapters)
    if output.suffix.lower() not in (".mp4", ".m4v"):
        raise MemoError(f"{output} does not end in .mp4; only MP4 is written")
    if args.memory_in and args.horizon:
        raise MemoError("--horizon is for a new video; the state given with --memory-in brings its own")

    from . import checkpoint
    from .audio import SAMPLE_RATE, count_frames, separate_vocals
    from .emotion import EMOTIONS, EmotionTrack, emotion_index
    from .face import check_size
    from .job import Settings, check_memory
    from .media import Recording
    from .memory import MemoryState
    from .optimise import Options
    from .pictures import open_picture
    from .pipeline import MemoPipeline
    from .video import VideoWriter

    # What can be found wrong without the networks, before they are loaded.
    settings = Settings(steps=args.steps, guidance_scale=args.guidance, seed=args.seed, speed=args.speed)
    if args.emotion == "none":  # as the nodes call it
        args.emotion = "null"
    if args.emotion in [str(index) for index in range(len(EMOTIONS))]:
        args.emotion = EMOTIONS[int(args.emotion)]
    if args.emotion not in ("detect", "null"):
        try:
            emotion_index(args.emotion)
        except MemoError as error:
            raise MemoError(f"--emotion may be detect, null (or none), or one by name: {error}") from error
    if args.size is not None:
        check_size(args.size)
    memory = MemoryState.load(args.memory_in) if args.memory_in else MemoryState.empty(args.horizon)
    store = None if args.no_store else _store(args.store)
    portrait = open_picture(args.portrait)
    recording = Recording(args.voice)
    waveform, rate = recording.mono(SAMPLE_RATE), SAMPLE_RATE  # an hour as it was recorded may not fit into memory
    num_frames = count_frames(recording.num_samples, recording.sample_rate, FPS)
    start, count = _span(args, num_frames, recording.seconds)
    device, dtype = _device(args)

    options = Options(rows_on_threads=device.type == "cpu")
    pipe = MemoPipeline.from_pretrained(args.checkpoint, device, dtype, lora=args.lora or (), options=options)
    if args.size is not None:
        pipe.check_room(args.size, guidance_scale=args.guidance, speed=args.speed)
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
        "guidance": args.guidance,
        "emotion": args.emotion,
    }
    if args.speed != "exact":
        about["speed"] = args.speed
    with VideoWriter(output, width, height, FPS, recording.sample_rate, about) as writer:
        sound = (round(frame * recording.sample_rate / FPS) for frame in (start, start + count))
        writer.write_audio(_begun(recording.span(*sound)))
        if args.separate_vocals:
            separator = pipe.nets.folder / checkpoint.VOCAL_SEPARATOR
            waveform, rate = separate_vocals(recording.read(), recording.sample_rate, separator)
        context = None if args.context == "whole" else args.context
        audio = pipe.encode_audio(waveform, rate, FPS, context, num_frames=num_frames)
        if args.emotion == "detect":
            emotion = pipe.detect_emotion(waveform, rate, audio.num_padded_frames, FPS)
        else:
            label = args.emotion
            emotion = None if label == "null" else EmotionTrack.constant(label, audio.num_padded_frames, FPS)
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
        return _stopped(args, writer, memory, start, stopped)
    if isinstance(stopped, Exception):
        raise stopped
    if args.memory_out:
        memory.save(args.memory_out)
    found = f", {stored} of {job.windows} windows from the store" if stored else ""
    print(f"{output}: {count} frames, {count / FPS:.2f} s, {width}x{height}, {count / bar.seconds:.2f} frames/s{found}")
    return OK


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
    from .clips import to_uint8

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
    args: argparse.Namespace, writer: VideoWriter, memory: MemoryState, start: int, reason: BaseException
) -> int:
    """Saves the memory after Ctrl-C or an error, and says what there is and how to go on; then raises the error."""
    done = writer.frames_written
    if not done:
        if not isinstance(reason, KeyboardInterrupt):
            raise reason
        _say("interrupted before the first frames were finished; no file was written")
        return INTERRUPTED
    state = args.memory_out or str(writer.path.with_suffix(".memory.safetensors"))
    memory.save(state)
    changes = {"start": (start + done) / FPS, "memory_in": state, "horizon": None, "memory_out": args.memory_out}
    changes["output"] = str(writer.path.with_stem(f"{writer.path.stem}-rest"))
    if args.duration is not None:
        changes["duration"] = args.duration - done / FPS
    holds = f"{writer.path} holds the first {done} frames ({done / FPS:.2f} s)"
    _say(f"interrupted: {holds}. To go on: {_command(args, changes)}")
    if not isinstance(reason, KeyboardInterrupt):
        raise reason
    return INTERRUPTED


def _command(args: argparse.Namespace, changes: dict[str, object]) -> str:
    """The command line of `memo generate` with these arguments, some of them changed."""
    defaults = argparse.ArgumentParser()
    _add_generate(defaults)
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


def _span(args: argparse.Namespace, end: int, seconds: float) -> tuple[int, int]:
    """First frame and number of frames, within a recording of `end` frames, so many seconds."""
    start = round(args.start * FPS)
    if start >= end:
        raise MemoError(f"--start is {args.start:g} s, but {args.voice} lasts {seconds:.2f} s")
    count = end - start
    if args.duration is not None:
        count = min(count, max(1, round(args.duration * FPS)))
    return start, count


def _store(folder: str | None) -> WindowStore | None:
    """The store at `folder`; by default ComfyUI's, when this is one of its custom nodes, or one in the user's cache."""
    from .store import WindowStore, allowed_bytes

    if folder is not None:
        return WindowStore(folder, allowed_bytes())
    here = Path(__file__).resolve().parents
    inside = len(here) > 3 and here[2].name == "custom_nodes"
    return WindowStore.default(here[3] / "user" / "memo" / "windows" if inside else None)


def _device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    import torch

    from . import devices

    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MemoError(f"--device is {args.device!r}; allowed are auto, cpu, cuda, cuda:0, ...") from error
    # What torch has a name for need not be there; on `meta` nothing is ever computed.
    found = getattr(torch, device.type, None)
    count = 1 if device.type == "cpu" else found.device_count() if hasattr(found, "device_count") else 0
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


# --- memo emotion, info, download, sheet ------------------------------------------------------------------------------


def detect(args: argparse.Namespace) -> int:
    output = Path(args.output or _named_after(args.voice, ".emotion.png"))
    kind = _check_picture(output, args.voice)

    from .audio import SAMPLE_RATE, count_frames
    from .checkpoint import EMOTION_HEAD, find
    from .clips import WINDOW
    from .drawing import draw_emotion
    from .emotion import EMOTIONS, detect_emotion
    from .media import Recording
    from .nets.emotion2vec import Emotion2Vec
    from .nets.emotion_head import EmotionHead

    folder = find(args.checkpoint)
    recording = Recording(args.voice)
    waveform, seconds = recording.mono(SAMPLE_RATE), recording.seconds
    encoder = Emotion2Vec.from_pretrained(folder / "emotion2vec")
    head = EmotionHead.from_pretrained(folder / EMOTION_HEAD)
    frames = WINDOW * math.ceil(count_frames(recording.num_samples, recording.sample_rate, FPS) / WINDOW)
    track = detect_emotion(waveform, SAMPLE_RATE, encoder, head, frames, FPS)

    labels = track.probabilities.argmax(dim=1).tolist()
    times = [*track.segment_starts.tolist(), seconds]
    changes = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]] + [len(labels)]
    print(f"{'from':>9} {'to':>9}  {'emotion':<10} probability")
    for first, last in zip(changes, changes[1:]):
        mean = float(track.probabilities[first:last, labels[first]].mean())
        print(f"{times[first]:7.2f} s {times[last]:7.2f} s  {EMOTIONS[labels[first]]:<10} {mean:11.2f}")
    _save_picture(draw_emotion(track, waveform, SAMPLE_RATE), output, kind)
    return OK


def info(args: argparse.Namespace) -> int:
    from . import checkpoint, face, lora
    from .memory import MemoryState

    if args.budget is not None:
        return _print_budget(args)
    if args.size is not None:
        raise MemoError("--size is for --budget")
    if args.target not in checkpoint.EMBEDDED and Path(args.target).is_file():
        if lora.is_adapter(args.target):
            print(lora.read(args.target).describe())
        else:
            print(MemoryState.load(args.target).inspect())
        return OK
    nets = checkpoint.load(args.target)  # all of it: what is printed is known to fit together
    parts = {
        "reference_net": nets.reference_net,
        "diffusion_net": nets.diffusion_net,
        "image_proj": nets.image_proj,
        "audio_proj": nets.audio_proj,
        "vae": nets.vae,
        "wav2vec2": nets.speech_encoder,
        "emotion2vec": nets.emotion_encoder,
        checkpoint.EMOTION_HEAD: nets.emotion_head,
    }
    face_models = [f"{face.FOLDER}/{name}" for name in (face.DETECTOR, face.EMBEDDER)]
    side = 8 * nets.sample_size
    print(f"checkpoint   {nets.folder}\ndigest       {nets.digest}\ntrained at   {side}x{side} pixels\n")
    print(f"{'network':<32} {'parameters':>14} {'on disk':>10}")
    for name, net in parts.items():
        size = sum(file.stat().st_size for file in (nets.folder / name).iterdir() if file.is_file())
        print(f"{name:<32} {sum(p.numel() for p in net.parameters()):>14,} {size / 1e6:>7.1f} MB")
    print()
    for name in (*face_models, checkpoint.VOCAL_SEPARATOR):
        print(f"{'there  ' if (nets.folder / name).is_file() else 'missing'}      {name} (optional)")
    return OK


def _print_budget(args: argparse.Namespace) -> int:
    import torch

    from . import budget, checkpoint
    from .face import check_size

    if args.target == "released":
        nets = budget.released()
    else:
        nets = checkpoint.load(args.target, "meta", torch.bfloat16)
    height, width = args.size or (8 * nets.sample_size,) * 2
    check_size((height, width))
    if max(height, width) > 4096:
        raise MemoError(f"--size is {width}x{height}; up to 4096 pixels a side are counted")
    budgets = [(f"{size:g} GB card", int(size * budget.GIB) - budget.DRIVER) for size in (args.budget or 12, 8)]
    if args.budget:
        budgets = budgets[:1]
    elif torch.cuda.is_available():
        budgets.append((torch.cuda.get_device_name(), budget.free_bytes(torch.device("cuda"))))
    print(budget.table(nets, height, width, budgets))
    return OK


def download(args: argparse.Namespace) -> int:
    from . import download as weights

    print(weights.licences(args.only), flush=True)
    if not args.only or "face" in args.only:
        print("The face models are not for commercial use: leave them out with --only and the other names.", flush=True)
    try:
        fetched = weights.download(args.folder, args.only)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from here")
        return INTERRUPTED
    print(f"{args.folder}: {len(fetched)} files fetched" if fetched else f"{args.folder}: nothing was missing")
    return OK


def sheet(args: argparse.Namespace) -> int:
    from PIL import Image, ImageDraw, ImageFont

    from .video import read_video

    output = Path(args.output or _named_after(args.video, ".png"))
    kind = _check_picture(output, args.video)
    about, frames = read_video(args.video)
    count = about.frames
    pictures = _evenly(frames, count, args.frames)
    if len(pictures) < min(args.frames, count):  # fewer than listed, as where parts were cut out
        count = sum(1 for _ in read_video(args.video)[1])
        pictures = _evenly(read_video(args.video)[1], count, args.frames)
    if not pictures:
        raise MemoError(f"{args.video} holds no frame that can be decoded")
    columns = min(args.columns, len(pictures))
    height, width = pictures[0][1].shape[:2]
    picture = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * (height + 20)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for place, (number, pixels) in enumerate(pictures):
        x, y = place % columns * width, place // columns * (height + 20)
        picture.paste(Image.fromarray(pixels), (x, y))
        draw.text((x + 4, y + height + 3), f"{number / about.fps:.2f} s", fill="black", font=font)
    _save_picture(picture, output, kind)
    return OK


def _evenly(frames: Iterator[NDArray[np.uint8]], listed: int, wanted: int) -> list[tuple[int, NDArray[np.uint8]]]:
    """Evenly spaced ones of so many listed frames, at most `wanted`, with their numbers."""
    count = min(wanted, listed)
    numbers = {round((i + 0.5) * listed / count - 0.5) for i in range(count)}
    return [(number, frame) for number, frame in enumerate(frames) if number in numbers]


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _save_picture(picture: Image.Image, path: Path, kind: str) -> None:
    try:
        with replace_whole(path) as temporary:
            picture.save(temporary, kind)
    except OSError as error:
        raise MemoError(f"cannot write {path}: {error.strerror or error}") from error
    print(path)


def _named_after(source: str, suffix: str) -> str:
    """Name of a file here for what is made of `source`."""
    if not Path(source).name:
        raise MemoError(f"{source!r} is no file")
    return Path(source).stem + suffix


def _check_output(path: str | Path | None, option: str, *others: str | Path | None) -> None:
    """MemoError, before anything is done, where a file cannot be written or would replace one of the others."""
    if path is None:
        return
    if not os.path.isdir(Path(path).absolute().parent):
        raise MemoError(f"cannot write {path}: there is no folder {Path(path).parent}")
    if os.path.isdir(path):
        raise MemoError(f"cannot write {path}: it is a folder")
    for other in filter(None, others):
        if os.path.abspath(path) == os.path.abspath(other) or _are_one(path, other):
            raise MemoError(f"{path} would replace {other}; name another with {option}")


def _are_one(a: str | Path, b: str | Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # not there yet
        return False


def _check_picture(path: Path, source: str) -> str:
    """What `_check_output` checks, and the kind of picture that the name stands for."""
    from PIL import Image

    _check_output(path, "-o", source)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise MemoError(f"cannot write {path}: name a .png")
    return kind


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def _seconds(text: str) -> float:
    return _number(text, 0, 1e6, "a number of seconds")


def _gigabytes(text: str) -> float:
    return _number(text, 0.001, 1e6, "a number of gigabytes above 0")


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}" + (f", at most {high:.0f}" if value > high else ""))
    return value


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
    return text if text in ("auto", "whole", "local") else _seconds(text)


def _size(text: str) -> tuple[int, int]:
    """Height and width from "N" or "WxH"."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
        width, height = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor WIDTHxHEIGHT") from None
    return height, width


def _say(text: str) -> None:
    print(f"memo: {text}", file=sys.stderr)


def _fail(text: str) -> int:
    _say(f"error: {text}")
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
