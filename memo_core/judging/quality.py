"""Is a clip still good? Colours, sharpness, motion, likeness and identity over time, measured against the portrait."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ComposeError, PortraitError
from ..video.compose import Frame, check_frame, resize_frames, to_float

if TYPE_CHECKING:
    from ..encoders.face import FaceAnalyzer


BATCH = 16  # frames measured at once
POOL = 8  # colours are compared between means of 8x8 pixels
LIKENESS_HEIGHT, LIKENESS_WINDOW = 64, 7
IDENTITY_EVERY = 8  # frames between two looks at the face
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class Quality:
    """What `measure` found, float32 arrays [F], one value a frame.

    colour: mean CIE76 Delta E to the portrait in Lab, 0 is equal, 2 just visible, above 10 another colour.
    sharpness: variance of the Laplacian in parts of the portrait's; 1 is as sharp.
    motion: mean absolute difference to the frame before, in levels of 255; 0 for the first frame.
    likeness: structural similarity with the portrait, luma at 64 pixels height; 1 is equal.
    identity: cosine between the ArcFace embeddings of frame and portrait, -1 to 1, 0 where no face is found; every
        eighth frame is looked at, linear between. None without face models or a face in the portrait.
    fps: frames per second.
    """

    colour: NDArray[np.float32]
    sharpness: NDArray[np.float32]
    motion: NDArray[np.float32]
    likeness: NDArray[np.float32]
    identity: NDArray[np.float32] | None
    fps: float

    @property
    def num_frames(self) -> int:
        """How many frames were measured."""
        return len(self.colour)

    def curves(self) -> list[tuple[Curve, NDArray[np.float32]]]:
        """The measures that were taken, in the order in which they are told and drawn."""
        present = [(curve, getattr(self, curve.name)) for curve in CURVES]
        return [(curve, values) for curve, values in present if values is not None]

    def summary(self) -> str:
        """A verdict, then for each measure what happens to it and its mean, start, end and worst value with its time.

        Start and end are means over a second, or over a third of a clip shorter than three.
        """
        rows = []
        for curve, values in self.curves():
            verdict, _ = curve.verdict(values, self.fps)
            start, end = ends(values, self.fps, curve.skip)
            rest = values[curve.skip :] if len(values) > curve.skip else values
            worst = curve.worst(rest) + len(values) - len(rest)
            rows.append(
                f"{curve.title}: {verdict}; mean {rest.mean():.3g}, start {start:.3g}, end {end:.3g}, "
                f"worst {values[worst]:.3g} at {worst / self.fps:.1f} s ({curve.unit})"
            )
        return "\n".join([self.headline(), *rows])

    def headline(self) -> str:
        """The clip's length, and what is wrong with it, or that it holds."""
        verdicts = [curve.verdict(values, self.fps) for curve, values in self.curves()]
        findings = ", ".join(words for words, is_good in verdicts if not is_good)
        count = "1 frame" if self.num_frames == 1 else f"{self.num_frames} frames"
        length = f"{count}, {self.num_frames / self.fps:.1f} s at {self.fps:g} fps"
        return f"{length}: {findings or 'holds'}"


@dataclass(frozen=True)
class Curve:
    """How one measure is named, judged and drawn."""

    name: str  # attribute of Quality
    title: str
    unit: str
    colour: str
    good: float | None  # a line drawn for orientation
    top: float  # the axis reaches at least this high
    skip: int = 0  # leading frames without a meaning
    low_is_bad: bool = True

    def worst(self, values: NDArray[np.float32]) -> int:
        """The index of the worst of values [F]."""
        if self.name == "sharpness":  # too much is as bad as too little
            return int(np.abs(np.log(np.maximum(values, 1e-6))).argmax())
        return int(values.argmin() if self.low_is_bad else values.argmax())

    def verdict(self, values: NDArray[np.float32], fps: float) -> Verdict:
        """In words, and whether it is good, of values [F]."""
        start, end = ends(values, fps, self.skip)
        return _VERDICTS[self.name](values[self.skip :], start, end)


Verdict = tuple[str, bool]  # in words, and whether it is good


def _colour(values: NDArray[np.float32], start: float, end: float) -> Verdict:
    if end > start + 3 and end > 5:
        return "colours drift", False
    return ("colours are off throughout", False) if values.mean() > 12 else ("holds", True)


def _sharpness(values: NDArray[np.float32], start: float, end: float) -> Verdict:
    if end < 0.6 * start:
        return "gets blurred", False
    if end > 1.7 * start:
        return "gets noisy or too sharp", False
    if values.mean() < 0.1:
        return "blurred throughout", False
    if values.mean() > 3:
        return "noisy or too sharp throughout", False
    # What an autoencoder brings back is softer than what went in: said, but no fault of the clip.
    return ("holds, softer than the portrait" if values.mean() < 0.5 else "holds"), True


def _motion(values: NDArray[np.float32], start: float, end: float) -> Verdict:
    if not len(values):
        return "one frame", True
    if values.mean() < 0.02:
        return "stands still", False
    if values.max() > max(12 * float(np.median(values)), 12):
        return "jumps", False
    return "moves", True


def _likeness(values: NDArray[np.float32], start: float, end: float) -> Verdict:
    if end < start - 0.15:
        return "likeness fades", False
    return ("unlike the portrait", False) if values.mean() < 0.4 else ("holds", True)


def _identity(values: NDArray[np.float32], start: float, end: float) -> Verdict:
    if end < start - 0.15:
        return "becomes another person", False
    return ("hardly the same person", False) if values.mean() < 0.3 else ("holds", True)


_VERDICTS: dict[str, Callable[[NDArray[np.float32], float, float], Verdict]] = {
    "colour": _colour,
    "sharpness": _sharpness,
    "motion": _motion,
    "likeness": _likeness,
    "identity": _identity,
}

CURVES = (
    Curve("colour", "Colour", "Delta E to the portrait, 0 is equal", "#d65d42", None, 10, low_is_bad=False),
    Curve("sharpness", "Sharpness", "1 is as sharp as the portrait", "#337ab7", 1, 1.5),
    Curve("motion", "Motion", "levels of 255 from frame to frame", "#785eb4", None, 2, 1, low_is_bad=False),
    Curve("likeness", "Likeness", "structural similarity, 1 is equal", "#2a8c62", 1, 1),
    Curve("identity", "Identity", "cosine of the face embeddings, 1 is equal", "#b07c14", 1, 1),
)


def ends(values: NDArray[np.float32], fps: float, skip: int = 0) -> tuple[float, float]:
    """Means of the first and the last second, or of a third of what is shorter than three."""
    values = values[skip:] if len(values) > skip else values
    count = max(1, min(round(fps), len(values) // 3))
    return float(values[:count].mean()), float(values[-count:].mean())


@torch.no_grad()
def measure(
    frames: Iterable[Frame],
    portrait: Tensor,
    face_analyzer: FaceAnalyzer | None = None,
    face_embedding: Tensor | NDArray[Any] | None = None,
    fps: float = 30,
) -> Quality:
    """Compares every frame with the portrait, 16 at a time.

    Args:
        frames: uint8 or float in [0, 1], [H, W, 3], of one size and of the portrait's aspect. NaN counts as black.
        portrait: [3, H, W] in [-1, 1], as in `Reference.pixels`.
        face_analyzer, face_embedding: for the identity, as in `MemoPipeline.face_analyzer` and
            `Reference.face_embedding`; without either, or with a zero embedding, it is not measured.

    Raises:
        ComposeError: no frames, frames of another shape, size or aspect, or an fps that is not positive.
        PortraitError: another portrait.
    """
    if not 0 < fps < math.inf:
        raise ComposeError(f"fps is {fps}; allowed is a positive number")
    portrait = check_portrait(portrait)
    identity = _Identity.create(face_analyzer, face_embedding)
    target: Comparison | None = None
    size: tuple[int, ...] = ()
    last: Tensor | None = None
    columns: dict[str, list[Tensor]] = {"colour": [], "sharpness": [], "motion": [], "likeness": []}
    for batch in _batches(frames):
        if target is None:
            size = tuple(batch.shape[2:])
            target = Comparison(fit_portrait(portrait, *size))
        if tuple(batch.shape[2:]) != size:
            raise ComposeError(f"frames of {size[1]}x{size[0]} and {batch.shape[3]}x{batch.shape[2]} in one clip")
        before = torch.cat([batch[:1] if last is None else last, batch[:-1]])
        last = batch[-1:].clone()
        columns["colour"].append(target.colour_distance(batch))
        columns["sharpness"].append(target.sharpness(batch))
        columns["motion"].append((batch - before).abs().mean(dim=(1, 2, 3)) * 255)
        columns["likeness"].append(target.likeness(batch))
        if identity is not None:
            identity.look(batch)
    if target is None:
        raise ComposeError("there are no frames to measure")
    arrays = {name: torch.cat(parts).cpu().numpy() for name, parts in columns.items()}
    return Quality(**arrays, identity=None if identity is None else identity.curve(), fps=float(fps))


def _batches(frames: Iterable[Frame]) -> Iterator[Tensor]:
    """Frames as float32 [up to 16, 3, H, W] in [0, 1], on the CPU."""
    frames = iter(frames)
    while part := [check_frame(frame) for frame in islice(frames, BATCH)]:
        if len({tuple(frame.shape) for frame in part}) > 1:
            sizes = sorted({f"{frame.shape[1]}x{frame.shape[0]}" for frame in part})
            raise ComposeError(f"frames of {' and '.join(sizes)} in one clip; scale them to one size first")
        batch = torch.stack([to_float(frame).cpu() for frame in part])
        yield batch.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1).permute(0, 3, 1, 2).contiguous()


def check_portrait(portrait: Tensor) -> Tensor:
    """The portrait [3, H, W] in [-1, 1] as float32 in [0, 1], on the CPU; PortraitError if it is none."""
    if portrait.ndim != 3 or len(portrait) != 3 or 0 in portrait.shape or not portrait.is_floating_point():
        raise PortraitError(
            f"the portrait is a float tensor [3, H, W] in [-1, 1]; received {portrait.dtype} {list(portrait.shape)}"
        )
    low, high = (float(value) for value in portrait.detach().aminmax())
    if not -1.001 <= low <= high <= 1.001:  # also refuses NaN
        raise PortraitError(f"the portrait's values reach from {low:g} to {high:g}; allowed is [-1, 1]")
    return portrait.detach().float().cpu().add(1).div(2).clamp(0, 1)


def fit_portrait(portrait: Tensor, height: int, width: int) -> Tensor:
    """The portrait [3, H, W] at the frames' size; ComposeError if these have another aspect."""
    aspect = portrait.shape[2] / portrait.shape[1]
    if abs(math.log(width / height / aspect)) > 0.05:
        raise ComposeError(
            f"frames of {width}x{height} have another aspect than the portrait of {portrait.shape[2]}x"
            f"{portrait.shape[1]}; measure the clip as it was sampled, before it is cut or pasted"
        )
    return resize_frames(portrait.permute(1, 2, 0), height, width).permute(2, 0, 1)


class Comparison:
    """The portrait [3, H, W] in [0, 1] and what frames [F, 3, H, W] are compared with; each answer is [F]."""

    def __init__(self, portrait: Tensor) -> None:
        self._lab = to_lab(_pool(portrait[None]))
        self._edges = float(_laplacian(portrait[None]).clamp_min(1e-6))  # a flat portrait has none
        self._small = _small_luma(portrait[None])
        self._contrast = float(_luma(portrait[None]).std().clamp_min(1e-3))

    def to(self, device: torch.device) -> Comparison:
        """Where frames are compared."""
        self._lab, self._small = self._lab.to(device), self._small.to(device)
        return self

    def colour_distance(self, frames: Tensor) -> Tensor:
        """Mean Delta E (CIE 1976) of the frames' colours, in means of 8x8 pixels."""
        return (to_lab(_pool(frames)) - self._lab).norm(dim=1).mean(dim=(1, 2))

    def sharpness(self, frames: Tensor) -> Tensor:
        """In parts of the portrait's."""
        return _laplacian(frames) / self._edges

    def contrast(self, frames: Tensor) -> Tensor:
        """In parts of the portrait's."""
        return _luma(frames).flatten(1).std(dim=1) / self._contrast

    def likeness(self, frames: Tensor) -> Tensor:
        """SSIM of small pictures, up to 1."""
        return _ssim(_small_luma(frames), self._small)


def _luma(frames: Tensor) -> Tensor:
    """[F, 3, H, W] -> [F, 1, H, W]."""
    return (frames * frames.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def _pool(frames: Tensor) -> Tensor:
    """Means of 8x8 pixels."""
    height, width = (max(1, side // POOL) for side in frames.shape[2:])
    return F.interpolate(frames, (height, width), mode="area")


def _laplacian(frames: Tensor) -> Tensor:
    """Variance of the Laplacian of the luma, [F]."""
    luma = F.pad(_luma(frames), (1, 1, 1, 1), mode="replicate")
    kernel = luma.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(luma, kernel).flatten(1).var(dim=1, correction=0)


def _small_luma(frames: Tensor) -> Tensor:
    height, width = frames.shape[2:]
    size = LIKENESS_HEIGHT, max(1, round(LIKENESS_HEIGHT * width / height))
    return F.interpolate(_luma(frames), size, mode="bilinear", antialias=True)


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, with a square window of 7 pixels) of [F, 1, H, W] and [1, 1, H, W]."""
    window = min(LIKENESS_WINDOW, *a.shape[2:])

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, 1)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean(dim=(1, 2, 3))


def to_lab(rgb: Tensor) -> Tensor:
    """sRGB [F, 3, H, W] in [0, 1] -> CIE L*a*b* under D65, L* 0 to 100 (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055).clamp_min(0) ** 2.4)
    matrix = rgb.new_tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    matrix = matrix / matrix.sum(1, keepdim=True)  # white becomes 1, 1, 1
    xyz = torch.einsum("ij,fjhw->fihw", matrix, linear)
    delta = 6 / 29
    x, y, z = torch.where(xyz > delta**3, xyz.clamp_min(1e-9) ** (1 / 3), xyz / (3 * delta**2) + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


class _Identity:
    """Looks at the face of every eighth frame, and of the last."""

    def __init__(self, analyzer: FaceAnalyzer, embedding: NDArray[np.float64]) -> None:
        self._analyzer, self._embedding = analyzer, embedding / np.linalg.norm(embedding)
        self._count = 0
        self._at: list[int] = []
        self._cosines: list[float] = []
        self._last: Tensor | None = None

    @classmethod
    def create(cls, analyzer: FaceAnalyzer | None, embedding: Tensor | NDArray[Any] | None) -> _Identity | None:
        if analyzer is None or embedding is None:
            return None
        values = torch.as_tensor(embedding).detach().double().cpu().reshape(-1).numpy()
        return cls(analyzer, values) if np.linalg.norm(values) > 0 else None

    def look(self, frames: Tensor) -> None:
        for frame in frames:
            if self._count % IDENTITY_EVERY == 0:
                self._examine(frame, self._count)
            self._count += 1
        self._last = frames[-1].clone()

    def _examine(self, frame: Tensor, number: int) -> None:
        image = frame.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        faces = self._analyzer.detect(image)
        cosine = 0.0
        if faces:
            found = self._analyzer.embed(image, faces[0]).astype(np.float64)
            cosine = float(found @ self._embedding / max(np.linalg.norm(found), 1e-12))
        self._at.append(number)
        self._cosines.append(cosine)

    def curve(self) -> NDArray[np.float32]:
        if self._last is not None and self._at[-1] != self._count - 1:
            self._examine(self._last, self._count - 1)
        return np.interp(np.arange(self._count), self._at, self._cosines).astype(np.float32)


def axis_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
