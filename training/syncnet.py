"""SyncNet: do the lips move with the voice?

Chung and Zisserman 2016, "Out of time: automated lip sync in the wild".

Two convolutional networks bring five frames of a face and the 0.2 s of sound that belong to them into one space, where
what belongs together lies close. Layers, parameter names and every number on the way in and out are those of the
published weights, `syncnet_v2.model` (github.com/joonson/syncnet_python), so that confidence and distance are the
LSE-C and LSE-D, or Sync-C and Sync-D, of the literature.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from memo_core.errors import CheckpointError
from memo_core.nets.weights import load_strict, read_tensors

FILE = "syncnet_v2.model"
SOURCE = "http://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model"
FPS, RATE, SIZE = 25, 16000, 224
FRAMES = 5  # frames of picture in a window
STEPS, STEPS_PER_FRAME = 20, 4  # of sound, 100 a second
SHIFT = 15  # frames, how far the sound is moved to find where it fits
SMOOTH = 13  # frames over which the median of the face's place is taken, as published
OUTSIDE = 110  # gray beyond the frame, as published
CHUNK = 16  # frames that go through the network at once: about 0.3 GB
Box = Sequence[float]  # left, top, right, bottom in pixels


class SyncScore(NamedTuple):
    """How well sound and picture fit.

    offset: frames at 25 fps by which the picture comes later than the sound; 0 is in sync.
    confidence: median less minimum over shifts of the mean distance (LSE-C, Sync-C); higher is better, a good talking
        video has 6 to 9.
    distance: that minimum (LSE-D, Sync-D); lower is better.
    """

    offset: int
    confidence: float
    distance: float


class SyncNet(nn.Module):
    """The network, ready to judge; it works on the device that its weights are on."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_conv(nn.Conv2d, 1, 64, 3, padding=1),
            nn.MaxPool2d(1, 1),
            *_conv(nn.Conv2d, 64, 192, 3, padding=1),
            nn.MaxPool2d(3, (1, 2)),
            *_conv(nn.Conv2d, 192, 384, 3, padding=1),
            *_conv(nn.Conv2d, 384, 256, 3, padding=1),
            *_conv(nn.Conv2d, 256, 256, 3, padding=1),
            nn.MaxPool2d(3, 2),
            *_conv(nn.Conv2d, 256, 512, (5, 4)),
        )
        self.netfcaud = _head()
        self.netcnnlip = nn.Sequential(
            *_conv(nn.Conv3d, 3, 96, (FRAMES, 7, 7), stride=(1, 2, 2)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv(nn.Conv3d, 96, 256, (1, 5, 5), stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_conv(nn.Conv3d, 256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_conv(nn.Conv3d, 256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_conv(nn.Conv3d, 256, 256, (1, 3, 3), padding=(0, 1, 1)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv(nn.Conv3d, 256, 512, (1, 6, 6)),
        )
        self.netfclip = _head()
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyncNet:
        """Reads the published `syncnet_v2.model`, a dictionary of tensors.

        Raises CheckpointError if the file is absent, is not such a dictionary, or does not fit.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; SyncNet's weights are at {SOURCE}")
        try:
            tensors = read_tensors(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. If it holds a whole pickled network and you trust where it comes from, convert it once, "
                'with its source code at hand: python -c "import torch; torch.save(torch.load('
                f"'{path.name}', weights_only=False).state_dict(), 'converted.model')\""
            ) from error
        net = cls()
        # Files from before PyTorch 0.4.1 do not count batches; nothing here reads the count.
        counts = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
        load_strict(net, counts | tensors, path)
        return net

    @classmethod
    def random(cls, seed: int = 0) -> SyncNet:
        """A network of random weights, for tests: its scores mean nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls()

    def score(self, faces: Tensor, waveform: Tensor) -> SyncScore:
        """How well a face and a voice fit.

        Args:
            faces: uint8 [F, 3, 224, 224], RGB, at 25 fps, cut out as `face_region` tells.
            waveform: [T] in [-1, 1] at 16 kHz; it starts with the first frame. What is longer than the other is cut.

        Raises:
            ValueError: another shape or type, samples that are not finite, or fewer than 6 frames of both.
        """
        return best_shift(*self.features(faces, waveform))

    def features(self, faces: Tensor, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [N, 1024] of the picture and of the sound, one a frame but for the last 5; see `score`."""
        waveform = _check_waveform(waveform)
        frames = min(len(faces), len(waveform) * FPS // RATE)
        if frames <= FRAMES:
            raise ValueError(
                f"{len(faces)} frames of 1/{FPS} s and {len(waveform) / RATE:.2f} s of sound; at least {FRAMES + 1} "
                "frames of both are needed"
            )
        # One window less than would fit, as published.
        return self.embed_faces(faces[: frames - 1]), self.embed_sound(waveform, frames - FRAMES)

    @torch.inference_mode()
    def embed_faces(self, faces: Tensor) -> Tensor:
        """Embeddings [F - 4, 1024] on the CPU of faces uint8 [F, 3, 224, 224]: each of a frame and the 4 after it."""
        if faces.dtype != torch.uint8 or faces.ndim != 4 or faces.shape[1:] != (3, SIZE, SIZE) or len(faces) < FRAMES:
            raise ValueError(
                f"faces are {faces.dtype} {list(faces.shape)}; SyncNet takes uint8 [F, 3, {SIZE}, {SIZE}], F from 5"
            )
        weight = self.netfclip[0].weight
        parts = []
        for start in range(0, len(faces) - FRAMES + 1, CHUNK):
            chunk = faces[start : start + CHUNK + FRAMES - 1].flip(1)  # it was trained on BGR in [0, 255]
            # Only the first layer mixes frames, so a run of frames gives what its windows would one by one.
            seen = self.netcnnlip(chunk.to(weight.device, weight.dtype).transpose(0, 1)[None])
            parts.append(self.netfclip(seen[0, :, :, 0, 0].T).float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_sound(self, waveform: Tensor, count: int) -> Tensor:
        """Embeddings [count, 1024] on the CPU of the sound [T] at 16 kHz: 0.2 s each, starting with each frame.

        Raises ValueError where the sound is too short for so many.
        """
        weight = self.netfcaud[0].weight
        steps = torch.from_numpy(mfcc(_check_waveform(waveform).cpu().numpy()))
        needed = STEPS_PER_FRAME * (count - 1) + STEPS
        if count < 1 or len(steps) < needed:
            raise ValueError(f"{count} windows of sound need {needed} steps of 10 ms; there are {len(steps)}")
        windows = steps[:needed].unfold(0, STEPS, STEPS_PER_FRAME)[:, None]  # [count, 1, 13, 20]
        parts = []
        for part in windows.split(256):
            heard = self.netcnnaud(part.to(weight.device, weight.dtype)).flatten(1)
            parts.append(self.netfcaud(heard).float().cpu())
        return torch.cat(parts)


def _conv(kind: type[nn.Module], fan_in: int, fan_out: int, kernel: int | tuple[int, ...], **options: Any) -> list:
    norm = nn.BatchNorm2d if kind is nn.Conv2d else nn.BatchNorm3d
    return [kind(fan_in, fan_out, kernel, **options), norm(fan_out), nn.ReLU(inplace=True)]


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


def best_shift(video: Tensor, sound: Tensor, shift: int = SHIFT) -> SyncScore:
    """The shift at which two tracks of features [N, D] lie closest, as published: beyond its ends the sound is zero.

    Distances are Euclidean, averaged over time. Clips of less than about 2 * `shift` frames are compared with those
    zeros for the most part; their confidence says little.

    Raises:
        ValueError: tracks of different shapes, empty, or not finite.
    """
    if video.shape != sound.shape or video.ndim != 2 or not len(video):
        raise ValueError(f"two tracks of features [N, D] are needed, got {list(video.shape)} and {list(sound.shape)}")
    padded = F.pad(sound, (0, 0, shift, shift))
    distances = torch.stack(
        [F.pairwise_distance(video, padded[i : i + len(video)]).mean() for i in range(2 * shift + 1)]
    )
    if not bool(distances.isfinite().all()):
        raise ValueError("the features are not finite; are the weights damaged?")
    distance, index = distances.min(0)
    return SyncScore(shift - int(index), float(distances.median() - distance), float(distance))


def mfcc(waveform: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mel-frequency cepstral coefficients [100 steps a second, 13] of sound [T] in [-1, 1] at 16 kHz.

    The numbers are those of python_speech_features' defaults on 16-bit samples, on which SyncNet was trained: windows
    of 25 ms without a taper, pre-emphasis 0.97, 26 triangles between whole FFT bins, liftering by 22, the first
    coefficient replaced by the log energy. librosa and torchaudio place their triangles otherwise.
    """
    from scipy.fft import dct

    window, hop, size, filters = RATE // 40, RATE // 100, 512, 26
    signal = np.trunc(np.asarray(waveform, np.float64).clip(-1, 1) * 32767)
    signal = np.append(signal[:1], signal[1:] - 0.97 * signal[:-1])
    count = 1 + max(0, -(-(len(signal) - window) // hop))
    signal = np.pad(signal, (0, (count - 1) * hop + window - len(signal)))
    frames = np.lib.stride_tricks.sliding_window_view(signal, window)[::hop]
    tiny = np.finfo(float).eps
    result = np.empty((count, 13), np.float32)
    bank = _triangles(filters, size)
    lifter = 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
    for start in range(0, count, 4096):  # an hour of spectra would be 0.7 GB
        power = np.abs(np.fft.rfft(frames[start : start + 4096], size)) ** 2 / size
        energy, bands = power.sum(1), power @ bank.T
        part = dct(np.log(np.where(bands == 0, tiny, bands)), type=2, axis=1, norm="ortho")[:, :13] * lifter
        part[:, 0] = np.log(np.where(energy == 0, tiny, energy))
        result[start : start + 4096] = part
    return result


def _triangles(filters: int, size: int) -> NDArray[np.float64]:
    """[filters, size / 2 + 1], evenly spaced in mel from 0 Hz to half the rate, with corners on whole bins."""
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), filters + 2)
    corners = np.floor((size + 1) * 700 * (10 ** (mel / 2595) - 1) / RATE)
    bins = np.arange(size // 2 + 1)
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    up, down = (bins - low) / np.maximum(middle - low, 1), (high - bins) / np.maximum(high - middle, 1)
    return np.where((bins >= low) & (bins < middle), up, np.where((bins >= middle) & (bins < high), down, 0.0))


def score_clip(
    net: SyncNet,
    path: str | os.PathLike[str],
    regions: Sequence[Box],
    start: float,
    end: float,
    max_pixels: float = math.inf,
) -> SyncScore:
    """Sync of a face in a part of a video file with its sound, by time stamps, at 25 fps, streamed.

    Args:
        regions: what the network sees of each picture, see `face_regions`; the last one stays.
        start, end: seconds in the file; sound that ends earlier ends the comparison.
        max_pixels: a larger picture raises Drop.

    Raises:
        Drop (of `media`): no sound, a damaged file, or a picture that ends early. ValueError: less than 6 frames.
    """
    from . import media

    faces = FaceStream(net, regions)
    for picture in media.at_rate(path, start, end, FPS, max_pixels):
        faces.push(picture)
    return faces.score(*media.sound(path, start, start + faces.frames / FPS, RATE))


class FaceStream:
    """The picture's side of `score_clip`, fed one picture after the other; only its features are kept."""

    def __init__(self, net: SyncNet, regions: Sequence[Box]) -> None:
        self.net, self.regions, self.frames = net, regions, 0
        self._faces: list[NDArray[np.uint8]] = []
        self._features: list[Tensor] = []

    def push(self, picture: NDArray[np.uint8]) -> None:
        """Takes the next picture at 25 fps, uint8 [H, W, 3]."""
        region = self.regions[min(self.frames, len(self.regions) - 1)]
        self._faces.append(cut(picture, region, SIZE, OUTSIDE))
        self.frames += 1
        if len(self._faces) == CHUNK + FRAMES - 1:
            self._embed()
            self._faces = self._faces[CHUNK:]  # the last 4 begin windows that are still to come

    def _embed(self) -> None:
        self._features.append(self.net.embed_faces(torch.from_numpy(np.stack(self._faces)).permute(0, 3, 1, 2)))

    def score(self, waveform: NDArray[np.float32], heard: float) -> SyncScore:
        """Of all pictures with the sound [T] at 16 kHz that begins with the first of them, of which the file has
        `heard` seconds. Raises ValueError for less than 6 frames.
        """
        if len(self._faces) >= FRAMES:
            self._embed()
        frames = self.frames
        if heard < (frames - 1) / FPS:
            frames = min(frames, (int(np.append(0, np.flatnonzero(waveform)).max()) + 1) * FPS // RATE)
        if frames <= FRAMES:
            raise ValueError(f"{frames} frames at {FPS} fps with sound; at least {FRAMES + 1} are needed")
        count = frames - FRAMES  # one window less than would fit, as published
        return best_shift(torch.cat(self._features)[:count], self.net.embed_sound(torch.from_numpy(waveform), count))


def face_regions(looks: Sequence[Sequence[float]] | NDArray[np.floating], start: float, end: float) -> list[Box]:
    """What SyncNet sees of the pictures at 25 fps from `start` to `end` seconds: one square for each.

    Args:
        looks: [K, 5], when the face was looked for, rising, and its box: seconds, left, top, right, bottom. Boxes are
            linear in between.

    Middle and size are medians of 13 frames, as published.
    """
    times, boxes = np.asarray(looks, np.float64)[:, 0], np.asarray(looks, np.float64)[:, 1:]
    half = (boxes[:, 2:] - boxes[:, :2]).max(1) / 2
    shape = np.column_stack([(boxes[:, :2] + boxes[:, 2:]) / 2, half])  # x, y, half the longer side
    wanted = start + np.arange(max(1, round((end - start) * FPS))) / FPS
    shape = np.column_stack([np.interp(wanted, times, column) for column in shape.T])
    reach = np.pad(shape, ((SMOOTH // 2, SMOOTH // 2), (0, 0)), mode="edge")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(reach, SMOOTH, axis=0), axis=-1)
    return [face_region((x - half, y - half, x + half, y + half)) for x, y, half in smooth]


def face_region(box: Sequence[float]) -> tuple[int, int, int, int]:
    """The square, left, top, right, bottom in pixels, that SyncNet wants to see of a face with this box.

    2.8 times half the box's longer side, moved down so that the chin is in; it may reach beyond the frame, where the
    published code sees gray 110.
    """
    left, top, right, bottom = box
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return int(x - 1.4 * half), int(y - half), int(x + 1.4 * half), int(y + 1.8 * half)


def cut(image: NDArray[np.uint8], box: Box, size: int, fill: int = 0) -> NDArray[np.uint8]:
    """The part of an image [H, W, 3] inside a box that may reach beyond it, where `fill` stands: [size, size, 3].

    Without smoothing when it shrinks, as OpenCV does, which the published networks were fed by.
    """
    picture = Image.fromarray(image)
    way = Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
    return np.asarray(picture.transform((size, size), *way, fillcolor=(fill, fill, fill)))


def _check_waveform(waveform: Tensor) -> Tensor:
    if waveform.ndim != 1 or not waveform.is_floating_point() or not len(waveform):
        raise ValueError(f"the sound is {waveform.dtype} {list(waveform.shape)}; float [T] in [-1, 1] is needed")
    if not bool(waveform.isfinite().all()):
        raise ValueError("the sound holds samples that are not finite")
    return waveform
