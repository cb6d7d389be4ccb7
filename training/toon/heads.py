"""Cartoon talking heads: an endless supply of faces whose every motion is known exactly.

A face is an `Identity` (colours and proportions) and a motion track [F, 10] (see `MOTION`). `render` draws it from
signed distances, so it is antialiased at any size; `perform` writes the motion track of an utterance spoken with an
emotion.

All lengths are in design units: the frame is 128 units wide and high, x to the viewer's right, y down. The head's own
coordinates have their origin at the centre of the head and tilt with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

FPS = 30

MOTION = (
    "mouth_open",  # [0, 1]: 0 closed, 1 wide open
    "mouth_width",  # [-1, 1]: -1 pursed, 1 spread
    "mouth_corners",  # [-1, 1]: -1 frown, 1 smile
    "brow_raise",  # [-1, 1]: -1 lowered, 1 raised
    "brow_slant",  # [-1, 1]: -1 inner ends down (anger), 1 inner ends up (worry)
    "lids",  # [0, 1]: 0 closed, 0.8 relaxed, 1 wide open
    "gaze_x",  # [-1, 1]: 1 to the viewer's right
    "gaze_y",  # [-1, 1]: 1 down
    "head_turn",  # [-1, 1]: 1 to the viewer's right
    "head_tilt",  # [-1, 1]: 1 tips the top of the head to the viewer's right
)
"""Names of the motion parameters, in the order of a motion track's last axis."""

PORTRAIT_SEED = 2**40 + 28
DESIGN = 128.0
HEAD_X, HEAD_Y = 64.0, 60.0
PIVOT_Y = 30.0  # the head tilts about this point of its own vertical axis, near the neck
TILT = math.radians(8.0)
JAW_DROP = 3.0
MOUTH_OPENING = 27.0
CORNER_LIFT = 8.0
REST_LIFT = 2.6  # a mouth at rest is friendly
BROW_LIFT = 6.0
BROW_ANGLE = 0.5
REST_SLANT = 0.12
GAZE_X, GAZE_Y = 3.6, 2.8
RELAXED_LIDS = 0.8
# How far a feature at full head turn shifts: the nearer to the viewer, the further.
TURN_NOSE, TURN_MOUTH, TURN_EYES, TURN_HAIR, TURN_FACE, TURN_BACK = 6.5, 5.5, 5.0, 2.4, 1.4, -1.2

Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class HairStyle:
    """A haircut: a cap around the skull, minus a window for the face, plus what hangs or sits behind the head."""

    volume: float = 4.0  # how far the cap stands out from the skull
    scallops: int = 0  # bumps around the cap
    bump: float = 0.0  # their height; negative makes spikes
    window_x: float = 0.0  # centre of the window (times the parting's side)
    window_y: float = 14.0
    window_width: float = -3.0  # half width, relative to the face's
    window_height: float = 40.0
    window_square: bool = False
    shear: float = 0.0  # slope of the hairline towards the parting's side
    zigzag: float = 0.0  # teeth of the hairline
    cut: float = 4.0  # the cap ends here
    back_width: float = 0.0  # half width behind the head, relative to the face's; 0 for none
    back_bottom: float = 0.0
    # x relative to the face's half width (mirrored, unless 0: in the middle), y, radius
    buns: tuple[tuple[float, float, float], ...] = ()
    tint: float = 1.0  # 1 full hair colour; less lets the skin shine through


HAIR_STYLES: dict[str, HairStyle] = {
    "crop": HairStyle(window_height=38.0, zigzag=1.5),
    "parted": HairStyle(volume=5.0, window_x=9.0, window_y=16.0, window_width=2.0, window_height=43.0, shear=0.28,
                        cut=6.0),
    "buzz": HairStyle(volume=1.5, window_height=37.0, window_width=-2.0, cut=0.0, tint=0.72),
    "spiky": HairStyle(volume=4.0, scallops=11, bump=-7.0, window_height=37.0, zigzag=4.0, cut=0.0),
    "curly": HairStyle(volume=5.0, scallops=15, bump=4.0, window_height=36.0, window_width=-3.5, cut=14.0),
    "afro": HairStyle(volume=4.0, scallops=17, bump=3.0, window_height=36.0, window_width=-5.0, cut=8.0,
                      back_width=11.0, back_bottom=16.0),
    "bob": HairStyle(volume=5.0, window_y=20.0, window_width=-3.5, window_height=41.0, window_square=True,
                     zigzag=1.2, cut=36.0, back_width=5.0, back_bottom=38.0),
    "long": HairStyle(volume=4.5, window_y=16.0, window_width=-3.5, window_height=45.0, cut=40.0,
                      back_width=9.0, back_bottom=90.0),
    "swept": HairStyle(volume=5.5, window_x=8.0, window_y=18.0, window_width=4.5, window_height=46.0, shear=0.3,
                       cut=34.0, back_width=7.0, back_bottom=90.0),
    "bun": HairStyle(volume=3.0, window_height=39.0, window_width=-3.0, cut=2.0, buns=((0.0, -46.0, 10.5),)),
    "space buns": HairStyle(volume=4.0, window_y=18.0, window_width=-4.0, window_height=40.0, window_square=True,
                            zigzag=1.5, cut=10.0, buns=((-4.0, -36.0, 12.5),)),
    "pigtails": HairStyle(volume=3.5, window_y=15.0, window_width=-4.0, window_height=42.0, cut=8.0,
                          buns=((11.0, 8.0, 12.0), (12.0, 24.0, 9.5))),
}
"""Haircuts by name."""

CLOTHES_STYLES = ("crew", "v-neck", "stripes", "collar")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What stays the same about a face. Colours are RGB in [0, 1], lengths in design units."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    clothes: Colour
    trim: Colour
    background_top: Colour
    background_bottom: Colour
    face_width: float  # half width of the face
    cranium: float  # from the head's centre to its top
    chin: float  # from the head's centre to the chin
    taper: float  # how much narrower the jaw is than the temples
    ear: float
    eye_width: float  # half width of an eye
    eye_height: float
    eye_spacing: float  # from the middle of the face to an eye's centre
    eye_y: float
    iris_radius: float
    brow_y: float
    brow_length: float  # half length
    brow_thickness: float  # half thickness
    nose_width: float
    nose_y: float
    mouth_width: float  # half width at rest
    mouth_y: float
    lip_thickness: float
    blush: float
    hair_style: str
    parting: float  # -1 or 1: side of the parting
    clothes_style: str


SKINS: tuple[Colour, ...] = (
    (1.00, 0.87, 0.77), (0.98, 0.80, 0.67), (0.95, 0.75, 0.58), (0.88, 0.66, 0.47),
    (0.78, 0.55, 0.38), (0.68, 0.46, 0.32), (0.57, 0.38, 0.27), (0.49, 0.33, 0.25),
)
HAIRS: tuple[Colour, ...] = (
    (0.13, 0.11, 0.13), (0.27, 0.17, 0.12), (0.42, 0.26, 0.15), (0.60, 0.37, 0.18), (0.75, 0.32, 0.14),
    (0.93, 0.76, 0.38), (0.82, 0.80, 0.80), (0.93, 0.45, 0.60), (0.20, 0.55, 0.62),
    (0.45, 0.33, 0.68), (0.22, 0.35, 0.66),
)
IRISES: tuple[Colour, ...] = (
    (0.36, 0.22, 0.12), (0.52, 0.33, 0.14), (0.22, 0.48, 0.72), (0.24, 0.55, 0.36), (0.40, 0.46, 0.55),
    (0.18, 0.55, 0.60),
)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (
        value - value * saturation * max(0.0, min(k, 4.0 - k, 1.0)) for k in ((n + hue * 6.0) % 6.0 for n in (5, 3, 1))
    )
    return (red, green, blue)


def _mix(a: Colour, b: Colour, weight: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * weight, a[1] + (b[1] - a[1]) * weight, a[2] + (b[2] - a[2]) * weight)


def _scaled(colour: Colour, factor: float) -> Colour:
    return (min(1.0, colour[0] * factor), min(1.0, colour[1] * factor), min(1.0, colour[2] * factor))


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draw a face at random; the same state of `rng` gives the same face."""

    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    position = uniform(0.0, len(SKINS) - 1.001)
    skin = _mix(SKINS[int(position)], SKINS[int(position) + 1], position % 1.0)
    hair = _scaled(HAIRS[int(rng.integers(len(HAIRS)))], uniform(0.88, 1.1))
    hue = uniform(0.0, 1.0)
    background_top = _hsv(hue, uniform(0.12, 0.45), uniform(0.82, 0.97))
    background_bottom = _hsv((hue + uniform(-0.08, 0.08)) % 1.0, uniform(0.25, 0.55), uniform(0.65, 0.9))
    clothes_hue = (hue + uniform(0.25, 0.75)) % 1.0
    clothes = _hsv(clothes_hue, uniform(0.45, 0.85), uniform(0.35, 0.9))
    trim = (0.97, 0.95, 0.92) if rng.random() < 0.5 else _hsv((clothes_hue + uniform(0.35, 0.65)) % 1.0, 0.6, 0.85)
    eye_height = uniform(9.8, 12.0)
    eye_y = uniform(-5.0, -2.5)
    return Identity(
        skin=skin,
        hair=hair,
        iris=IRISES[int(rng.integers(len(IRISES)))],
        lips=_mix(_scaled(skin, 0.78), (0.85, 0.27, 0.33), uniform(0.55, 0.85)),
        clothes=clothes,
        trim=trim,
        background_top=background_top,
        background_bottom=_mix(background_bottom, background_top, 0.3),
        face_width=uniform(34.0, 38.5),
        cranium=uniform(41.0, 44.0),
        chin=uniform(43.0, 46.0),
        taper=uniform(0.0, 0.16),
        ear=uniform(0.85, 1.2),
        eye_width=uniform(9.2, 10.8),
        eye_height=eye_height,
        eye_spacing=uniform(16.5, 18.5),
        eye_y=eye_y,
        iris_radius=uniform(5.8, 7.0),
        brow_y=eye_y - eye_height - uniform(7.0, 8.5),
        brow_length=uniform(8.5, 10.5),
        brow_thickness=uniform(2.3, 3.1),
        nose_width=uniform(3.6, 5.6),
        nose_y=uniform(9.0, 11.0),
        mouth_width=uniform(16.0, 18.5),
        mouth_y=uniform(21.5, 23.0),
        lip_thickness=uniform(1.9, 2.8),
        blush=uniform(0.15, 0.55),
        hair_style=list(HAIR_STYLES)[int(rng.integers(len(HAIR_STYLES)))],
        parting=float(rng.choice((-1.0, 1.0))),
        clothes_style=CLOTHES_STYLES[int(rng.integers(len(CLOTHES_STYLES)))],
    )


def neutral_motion() -> Tensor:
    """The portrait's motion row [10]: mouth closed, eyes open and straight ahead, head frontal and upright."""
    motion = torch.zeros(len(MOTION))
    motion[MOTION.index("lids")] = RELAXED_LIDS
    return motion


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _ellipse(x: Tensor, y: Tensor, radius_x: Tensor | float, radius_y: Tensor | float) -> Tensor:
    """Signed distance to an ellipse, exact to first order near its edge."""
    x, y = x / radius_x, y / radius_y
    inside = torch.sqrt(x * x + y * y)
    slope = torch.sqrt((x / radius_x).square_().add_((y / radius_y).square_())).clamp_(min=1e-6)
    return (inside - 1.0).mul_(inside).div_(slope)


def _round(x: Tensor, y: Tensor, radius_x: float, radius_y: Tensor | float) -> Tensor:
    """Signed distance to a nearly circular ellipse: cheaper than `_ellipse`, its scale right on average."""
    mean = math.sqrt(radius_x * (radius_y if isinstance(radius_y, float) else float(radius_y.mean())))
    return torch.sqrt((x / radius_x).square_().add_((y / radius_y).square_())).sub_(1.0).mul_(mean)


class _Canvas:
    """Colours [F, 3, H, W] under construction; paints flat colours through coverages [F, H, W]."""

    def __init__(self, pixels: Tensor, scale: float) -> None:
        self.pixels = pixels
        self.scale = scale

    def coverage(self, distance: Tensor) -> Tensor:
        """How much of each pixel lies inside, from signed distances in design units."""
        return (0.5 - distance * self.scale).clamp_(0.0, 1.0)

    def paint(self, coverage: Tensor, colour: Colour) -> None:
        """Lay a colour over the picture where `coverage` [F, H, W] in [0, 1] says."""
        for channel in range(3):
            plane = self.pixels[:, channel]
            plane.addcmul_(coverage, colour[channel] - plane)

    def crop(self, box: tuple[int, int, int, int]) -> _Canvas:
        top, bottom, left, right = box
        return _Canvas(self.pixels[:, :, top:bottom, left:right], self.scale)


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Design coordinates of the pixels' centres, x [1, size] and y [size, 1]."""
    centres = (torch.arange(size, dtype=torch.float32) + 0.5) * (DESIGN / size)
    return centres[None, :], centres[:, None]


@lru_cache(maxsize=32)
def _backdrop(identity: Identity, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What never moves: background [3, H, W], the body's colour times its coverage [3, H, W], 1 - coverage [H, W]."""
    x, y = _grid(size)
    x, y = x.expand(size, size) - HEAD_X, y.expand(size, size)
    scale = size / DESIGN
    top, bottom = torch.tensor(identity.background_top), torch.tensor(identity.background_bottom)
    glow = (1.0 - torch.sqrt(x.square() + (y - 56.0).square()) / 80.0).clamp(min=0.0) * 0.10
    background = torch.lerp(top[:, None, None], bottom[:, None, None], y / DESIGN) + glow

    body = _Canvas(torch.zeros(1, 3, size, size), scale)
    shoulders = _ellipse(x, y - 152.0, 58.0, 44.0)[None]
    neck = torch.maximum(x.abs() - 13.5, 84.0 - y)[None]
    drawn = torch.maximum(body.coverage(shoulders), body.coverage(neck))
    body.paint(torch.ones_like(drawn), identity.clothes)
    if identity.clothes_style == "stripes":
        period = (y - 112.0).remainder(9.0)
        body.paint(body.coverage((period - 4.5).abs() - 2.1)[None], identity.trim)
    body.paint((0.25 * ((x.abs() - 30.0) / 26.0).clamp(0.0, 1.0))[None], _scaled(identity.clothes, 0.55))
    if identity.clothes_style == "v-neck":
        neckline = (x.abs() * 0.8 + (y - 127.0) * 0.6)[None]
    else:
        neckline = _ellipse(x, y - 106.0, 19.0, 10.5)[None]
    if identity.clothes_style != "stripes":
        body.paint(body.coverage(neckline - 3.0), identity.trim)
    bare = torch.minimum(neckline, torch.maximum(neck, (y - 112.0)[None]))
    body.paint(body.coverage(bare), _scaled(identity.skin, 0.93))
    shadow = ((115.0 - y) / 9.0).clamp(0.0, 1.0)[None] * 0.55
    body.paint(shadow * body.coverage(torch.minimum(neckline, neck)), _scaled(identity.skin, 0.68))
    if identity.clothes_style == "collar":
        flap = ((x.abs() - 13.5).abs() * 0.75 + (y - 119.0).abs() * 0.66 - 6.0)[None]
        body.paint(body.coverage(flap), identity.trim)
    drawn = drawn[0]
    return background, body.pixels[0] * drawn, 1.0 - drawn


def _box(
    size: int, half: float, top: float, bottom: float, tilt: float, turn: float
) -> tuple[int, int, int, int]:
    """Pixels (top, bottom, left, right) around head coordinates |x| <= half, top..bottom, tilted and shifted so far."""
    sine, lift = math.sin(tilt), abs(top - PIVOT_Y) * (1.0 - math.cos(tilt))
    rise = half * sine + 1.0
    half = half + max(abs(top - PIVOT_Y), abs(bottom - PIVOT_Y)) * sine + turn + 1.0
    scale = size / DESIGN
    return (
        max(0, math.floor((HEAD_Y + top - rise) * scale)),
        min(size, math.ceil((HEAD_Y + bottom + rise + lift) * scale)),
        max(0, math.floor((HEAD_X - half) * scale)),
        min(size, math.ceil((HEAD_X + half) * scale)),
    )


def _eyes_box(identity: Identity, size: int, tilt: float, turn: float) -> tuple[int, int, int, int]:
    half = identity.eye_spacing + max(identity.eye_width, identity.brow_length + identity.brow_thickness) + 2.0
    top, bottom = identity.brow_y - BROW_LIFT - 9.0, identity.eye_y + identity.eye_height + 2.0
    return _box(size, half, top, bottom, tilt, TURN_EYES * turn)


def _mouth_box(identity: Identity, size: int, tilt: float, turn: float) -> tuple[int, int, int, int]:
    """Around everything below the eyes that a face does: mouth, jaw, and the nose and cheeks drawn with them."""
    return _box(size, 33.0, identity.nose_y - 5.0, identity.chin + JAW_DROP + 1.0, tilt, TURN_NOSE * turn)


def _draw_hair_behind(canvas: _Canvas, identity: Identity, x: Tensor, y: Tensor) -> None:
    style = HAIR_STYLES[identity.hair_style]
    shapes: list[Tensor] = []
    if style.back_width > 0.0:
        half = identity.face_width + style.back_width
        top = -identity.cranium - style.volume + 2.0
        if style.scallops:
            shapes.append(_wavy(_round(x, y + 6.0, half, half), x, y + 6.0, style.scallops, style.bump))
        else:
            # a rounded box: round above, falling straight to its bottom edge
            below = (y - (top + half)).clamp_(min=0.0).sub_(style.back_bottom - top - half)
            above = (top + half - y).clamp_(min=0.0)
            shapes.append(torch.maximum(torch.sqrt(x * x + above * above).sub_(half), below))
    for bun_x, bun_y, radius in style.buns:
        side = x.abs() - (identity.face_width + bun_x) if bun_x else x
        shapes.append(torch.sqrt(side * side + (y - bun_y).square()).sub_(radius))
    if shapes:
        distance = shapes[0]
        for shape in shapes[1:]:
            distance = torch.minimum(distance, shape)
        canvas.paint(canvas.coverage(distance), _scaled(identity.hair, 0.82))


def _wavy(distance: Tensor, x: Tensor, y: Tensor, scallops: int, bump: float) -> Tensor:
    """Raise bumps (bump > 0) or spikes (bump < 0, on the upper half only) on a round shape."""
    wave = torch.atan2(x, -y).mul_(0.5 * scallops).sin_().abs_()
    if bump < 0.0:
        return distance - (1.0 - wave).mul_((0.6 - y / 30.0).clamp_(0.0, 1.0)).mul_(-bump)
    return distance - wave.mul_(bump)


def _draw_head(canvas: _Canvas, identity: Identity, x: Tensor, y: Tensor, turn: Tensor, jaw: Tensor) -> None:
    """Ears, face and the hair in front, for head coordinates x, y [F, H, W] and turn, jaw [F, 1, 1]."""
    style = HAIR_STYLES[identity.hair_style]
    skin = identity.skin

    ears = _round((x + turn).abs_().sub_(identity.face_width + 0.5), y - 3.0, 6.0 * identity.ear, 8.0 * identity.ear)
    cover = canvas.coverage(ears)
    canvas.paint(cover, _scaled(skin, 0.93))
    canvas.paint(canvas.coverage(ears + 3.2).mul_(0.6), _mix(_scaled(skin, 0.75), (0.85, 0.35, 0.3), 0.25))

    # The face: an egg, its lower half as long as the jaw is dropped.
    width = (1.0 - identity.taper * (y / identity.chin).clamp_(-0.4, 1.0)).mul_(identity.face_width)
    across = (x - TURN_FACE * turn).div_(width).square_()
    down = torch.where(y > 0, y / (identity.chin + jaw), y / identity.cranium).square_()
    # between a circle and a square, so that cheeks are full
    face = torch.sqrt(across.add_(down).add_(torch.sqrt(across.square().add_(down.square()))).mul_(0.5))
    face = face.sub_(1.0).mul_(identity.face_width + 4.0)
    face_cover = canvas.coverage(face)
    canvas.paint(face_cover, skin)
    shade = (face / 9.0 + 1.0).clamp_(0.0, 1.0).square_().mul_(face_cover).mul_(0.5)
    canvas.paint(shade, _mix(_scaled(skin, 0.8), (0.8, 0.35, 0.25), 0.12))

    # The hair in front: the cap, minus the window, above the cut.
    hair_x, hair_y = x - TURN_HAIR * turn, y + 4.0
    cap = _round(hair_x, hair_y, identity.face_width + style.volume, identity.cranium - 4.0 + style.volume)
    if style.bump:
        cap = _wavy(cap, hair_x, hair_y, style.scallops, style.bump)
    window_y = y - style.window_y
    if style.shear:
        window_y = window_y + hair_x * (style.shear * identity.parting)
    if style.zigzag:
        window_y = window_y + (hair_x / 11.0).remainder_(1.0).sub_(0.5).abs_().mul_(2.0 * style.zigzag)
    window_x = (hair_x - style.window_x * identity.parting) / (identity.face_width + style.window_width)
    window_x, window_y = window_x.square_(), (window_y / style.window_height).square_()
    if style.window_square:
        window = torch.sqrt(torch.sqrt(window_x.square_().add_(window_y.square_())))
    else:
        window = torch.sqrt(window_x.add_(window_y))
    window = window.sub_(1.0).mul_(36.0)
    colour = _mix(skin, identity.hair, style.tint)
    shadow = (window / 4.0 + 1.0).clamp_(0.0, 1.0).mul_(face_cover).mul_((1.0 - y / (style.cut + 6.0)).clamp_(0.0, 0.3))
    canvas.paint(shadow, _scaled(_mix(skin, identity.hair, 0.25), 0.7))
    hair = torch.maximum(torch.maximum(cap, -window), y - style.cut)
    cover = canvas.coverage(hair)
    canvas.paint(cover, colour)
    gloss = (1.0 - (cap + 8.0).abs_().div_(3.5)).clamp_(0.0, 1.0).mul_((hair_y / -40.0).clamp_(0.0, 0.7)).mul_(cover)
    canvas.paint(gloss.mul_(0.5), _mix(colour, (1.0, 1.0, 1.0), 0.45))


def _draw_eyes(canvas: _Canvas, identity: Identity, x: Tensor, y: Tensor, row: dict[str, Tensor]) -> None:
    """Eyes, lids and brows; both sides at once, in coordinates mirrored at the middle of the face."""
    x = x - TURN_EYES * row["head_turn"]
    side, mirrored = torch.sign(x), x.abs()
    width, height = identity.eye_width, identity.eye_height

    eye_x, eye_y = mirrored - identity.eye_spacing, y - identity.eye_y
    ball = _round(eye_x, eye_y, width, height)
    # The lid's edge is a parabola that slides from above the eye to its lower edge.
    edge = height * (2.02 * row["lids"] - 0.9)
    slope = (1.5 / width**2) * edge
    lid = (eye_y - edge * (0.75 * (eye_x / width).square_() - 1.0)).mul_(
        torch.rsqrt((slope * eye_x).square_().add_(1.0))
    )
    dark = _mix(_scaled(identity.hair, 0.4), (0.12, 0.08, 0.10), 0.6)
    ball_cover = canvas.coverage(ball)
    canvas.paint(canvas.coverage(ball - 0.9), _scaled(identity.skin, 0.72))
    canvas.paint(ball_cover, _mix(_scaled(identity.skin, 0.90), (0.80, 0.40, 0.38), 0.15))
    visible = canvas.coverage(-lid).mul_(ball_cover)
    canvas.paint(visible, (0.99, 0.99, 0.98))

    iris_x, iris_y = eye_x - side * (GAZE_X * row["gaze_x"]), eye_y - (GAZE_Y * row["gaze_y"] + 0.9)
    iris = torch.sqrt(iris_x.square().add_(iris_y.square())).sub_(identity.iris_radius)
    canvas.paint(canvas.coverage(iris).mul_(visible), _scaled(identity.iris, 0.55))
    canvas.paint(canvas.coverage(iris + 1.3).mul_(visible), identity.iris)
    canvas.paint(canvas.coverage(iris + 0.5 * identity.iris_radius).mul_(visible), (0.06, 0.05, 0.07))
    glint = torch.sqrt((iris_x + 2.2 * side).square_().add_((iris_y + 2.6).square_())).sub_(1.9)
    canvas.paint(canvas.coverage(glint).mul_(visible), (1.0, 1.0, 1.0))
    canvas.paint(canvas.coverage(torch.maximum(lid.abs_().sub_(1.5), ball - 1.3)), dark)

    brow_x, brow_y = mirrored - (identity.eye_spacing + 0.5), y - identity.brow_y + BROW_LIFT * row["brow_raise"]
    angle = BROW_ANGLE * (row["brow_slant"] + REST_SLANT)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    along = (brow_x * cosine).add_(brow_y * sine)
    across = (brow_y * cosine).sub_(brow_x * sine)
    near = along.clamp(-identity.brow_length, identity.brow_length)
    across.sub_(near.square().mul_(2.2 / identity.brow_length**2)).add_(0.8)
    thickness = identity.brow_thickness * (1.0 - near * (0.25 / identity.brow_length))
    brow = torch.sqrt((along - near).square_().add_(across.square_())).sub_(thickness)
    canvas.paint(canvas.coverage(brow), _mix(_scaled(identity.hair, 0.6), _scaled(identity.skin, 0.3), 0.35))


def _draw_mouth(canvas: _Canvas, identity: Identity, x: Tensor, y: Tensor, row: dict[str, Tensor]) -> None:
    """Cheeks, nose and mouth."""
    nose_x, cheek_y = x - TURN_NOSE * row["head_turn"], y - (identity.nose_y + 4.5)
    x = x - TURN_MOUTH * row["head_turn"]
    cheek = (x.abs() - 25.0).square_().add_(cheek_y.square_()).mul_(1.0 / 64.0)
    canvas.paint((1.0 - cheek).clamp_(0.0, 1.0).mul_(identity.blush),
                 _mix(_scaled(identity.skin, 0.9), (0.95, 0.35, 0.35), 0.5))
    nose_y = y - identity.nose_y
    canvas.paint(canvas.coverage(_round(nose_x, nose_y, identity.nose_width, 3.4)),
                 _mix(_scaled(identity.skin, 0.80), (0.85, 0.35, 0.30), 0.18))
    canvas.paint(canvas.coverage(_round(nose_x, nose_y + 1.0, identity.nose_width - 0.4, 3.0)),
                 _mix(_scaled(identity.skin, 0.95), (0.95, 0.5, 0.42), 0.12))

    # Between the corners the lips follow a parabola (smile or frown), parted by an ellipse's profile, mostly downwards.
    width = identity.mouth_width * (1.0 + 0.24 * row["mouth_width"])
    opening = MOUTH_OPENING * row["mouth_open"]
    lift = CORNER_LIFT * row["mouth_corners"] + REST_LIFT
    t = (x / width).clamp_(-1.0, 1.0)
    square = t.square()
    middle = (y - identity.mouth_y).sub_((0.4 - square) * lift)
    root = torch.sqrt(1.02 - square)
    profile = root - 0.1414
    bend = t * (-2.0 / width) * lift
    parting = t / root / width
    upper_slope = (bend + parting * (0.30 * opening)).clamp_(-1.6, 1.6)
    lower_slope = (bend - parting * (0.70 * opening)).clamp_(-1.6, 1.6)
    below_upper = middle + profile * (0.30 * opening)
    above_lower = profile * (0.70 * opening) - middle
    gap = -torch.minimum(
        below_upper * torch.rsqrt(upper_slope.square_().add_(1.0)),
        above_lower.mul_(torch.rsqrt(lower_slope.square_().add_(1.0))),
    )
    beyond = (x.abs() - width).clamp_(min=0.0)
    gap = torch.where(beyond > 0, torch.sqrt(beyond.square_().add_(gap.clamp(min=0.0).square_())), gap)
    canvas.paint(canvas.coverage(gap - identity.lip_thickness), identity.lips)
    inside = canvas.coverage(gap - 0.35)
    canvas.paint(inside, (0.27, 0.06, 0.09))
    tongue = _ellipse(x, middle - 0.74 * opening, 0.56 * width, 0.34 * opening + 0.1)
    canvas.paint(canvas.coverage(torch.maximum(tongue, gap + 0.9)), (0.89, 0.40, 0.42))
    teeth = torch.maximum(below_upper - (0.27 * opening).clamp(max=6.0), gap + 0.7)
    canvas.paint(canvas.coverage(teeth), (0.98, 0.97, 0.95))


@torch.no_grad()
def _render_chunk(identity: Identity, motion: Tensor, size: int) -> Tensor:
    scale = size / DESIGN
    background, body, body_hole = _backdrop(identity, size)
    row = {name: motion[:, i, None, None] for i, name in enumerate(MOTION)}
    angle = TILT * row["head_tilt"]
    cosine, sine = torch.cos(angle), torch.sin(angle)
    frame_x, frame_y = _grid(size)
    frame_x, frame_y = frame_x - HEAD_X, frame_y - (HEAD_Y + PIVOT_Y)
    x = cosine * frame_x + sine * frame_y
    y = (cosine * frame_y + PIVOT_Y) - sine * frame_x

    canvas = _Canvas(background.repeat(len(motion), 1, 1, 1), scale)
    _draw_hair_behind(canvas, identity, x - TURN_BACK * row["head_turn"], y)
    canvas.pixels.mul_(body_hole).add_(body)
    _draw_head(canvas, identity, x, y, row["head_turn"], JAW_DROP * row["mouth_open"])
    tilt, turn = float(angle.abs().max()), float(row["head_turn"].abs().max())
    for draw, box in (
        (_draw_eyes, _eyes_box(identity, size, tilt, turn)),
        (_draw_mouth, _mouth_box(identity, size, tilt, turn)),
    ):
        region = (slice(None), slice(box[0], box[1]), slice(box[2], box[3]))
        draw(canvas.crop(box), identity, x[region], y[region], row)
    return canvas.pixels.mul_(255.0).add_(0.5).clamp_(0.0, 255.0).to(torch.uint8)


def render(identity: Identity, motion: Tensor, size: int = 128) -> Tensor:
    """Draw a face at every row of a motion track.

    Args:
        identity: whose face.
        motion: [F, 10] float, columns as in `MOTION`; values outside the documented ranges are clamped to them.
        size: height and width in pixels, at least 64.

    Returns:
        uint8 [F, 3, size, size].

    Raises:
        ValueError: if `motion` is not [F, 10] or not finite, or `size` is below 64.
    """
    if motion.ndim != 2 or motion.shape[1] != len(MOTION):
        raise ValueError(f"motion must be [F, {len(MOTION)}], got {list(motion.shape)}")
    if not bool(torch.isfinite(motion).all()):
        raise ValueError("motion must be finite, got NaN or infinity")
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, got {size}")
    low = torch.tensor([0.0 if name in ("mouth_open", "lids") else -1.0 for name in MOTION])
    motion = motion.to(torch.float32).cpu().clamp(low, torch.ones(len(MOTION)))
    chunk = max(1, round(8 * (DESIGN / size) ** 2))  # intermediates of a chunk stay in the processor's cache
    frames = torch.empty(len(motion), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(motion), chunk):
        frames[start : start + chunk] = _render_chunk(identity, motion[start : start + chunk], size)
    return frames


def mask_outside_mouth_and_eyes(identity: Identity, size: int = 128) -> Tensor:
    """Where a face should stay as it is while it talks: bool [size, size], false where mouth, jaw, eyes and brows can
    move at full head turn and a tilt of 3 degrees (more than `perform` lasts in).
    """
    mask = torch.ones(size, size, dtype=torch.bool)
    tilt = math.radians(3.0)
    mouth_half = 1.24 * identity.mouth_width + identity.lip_thickness
    mouth_top = identity.mouth_y - 0.6 * (CORNER_LIFT + REST_LIFT) - 3.0
    for top, bottom, left, right in (
        _eyes_box(identity, size, tilt, 1.0),
        _box(size, mouth_half, mouth_top, identity.chin + JAW_DROP + 1.0, tilt, TURN_MOUTH),
    ):
        mask[top:bottom, left:right] = False
    return mask


# --- Performing -------------------------------------------------------------------------------------------------------


class SpokenMouth(Protocol):
    """What a performance needs to know of an utterance (`training.voices.Utterance` has it)."""

    @property
    def mouth_open(self) -> np.ndarray | Tensor:
        """[F] in [0, 1], at 30 frames a second."""

    @property
    def mouth_width(self) -> np.ndarray | Tensor:
        """[F] in [-1, 1], at 30 frames a second."""


SIGNATURE_COLUMNS = ("mouth_corners", "brow_raise", "brow_slant", "lids", "head_tilt")
"""The motion parameters an emotion sets; their means over a few seconds tell the emotions apart."""

SIGNATURES: tuple[tuple[float, ...], ...] = (
    # corners, raise, slant, lids, tilt
    (-0.45, -0.70, -0.95, 0.74, -0.15),  # angry: knitted brows, head lowered to charge
    (-0.90, -0.30, -0.35, 0.42, 0.35),  # disgusted: narrow eyes, mouth drawn down, head turned away
    (-0.50, 0.60, 0.85, 1.00, -0.30),  # fearful: wide eyes under lifted, worried brows
    (0.90, 0.30, 0.15, 0.72, 0.15),  # happy: a smile
    (0.05, 0.00, 0.00, 0.80, 0.00),  # neutral
    (0.45, 0.35, -0.60, 0.46, 0.40),  # other: sly, a smile under lowered lids
    (-0.75, -0.05, 0.95, 0.48, -0.35),  # sad: heavy lids, worried brows, mouth drawn down
    (0.10, 1.00, 0.05, 1.00, 0.05),  # surprised: brows as high as they go
)
"""Mean of each of SIGNATURE_COLUMNS by emotion: the first eight of `memo_core.release.EMOTIONS`, in their order."""

BLINK_LIDS = np.array([0.45, 0.05, 0.0, 0.25, 0.6, 0.9])  # factor on the lids, frame by frame
BLINKS_PER_SECOND = (0.20, 0.15, 0.12, 0.25, 0.25, 0.20, 0.20, 0.12)


def _smooth(values: np.ndarray, seconds: float) -> np.ndarray:
    """Smooth [F] with a Hann window so long, holding its ends."""
    window = np.hanning(2 * max(1, round(seconds * FPS / 2)) + 3)
    half = len(window) // 2
    return np.convolve(np.pad(values, half, mode="edge"), window / window.sum(), mode="valid")


def _drift(rng: np.random.Generator, frames: int, seconds: float) -> np.ndarray:
    """Smooth noise [F] about 0 that mostly stays within [-1, 1] and changes over so many seconds."""
    spacing = seconds * FPS
    knots = rng.uniform(-1.0, 1.0, math.ceil(frames / spacing) + 3)
    at = rng.uniform(0.0, 1.0) + np.arange(frames) / spacing
    return _smooth(np.interp(at, np.arange(len(knots)), knots), seconds)


def perform(utterance: SpokenMouth, emotion: int, rng: np.random.Generator) -> Tensor:
    """The face of somebody who says `utterance` with an emotion.

    Mouth opening and width are the utterance's. The emotion sets corners, brows, lids and the head's tilt
    (`SIGNATURES`) from the first frame to the last, livelier where the voice is louder. Blinks, glances and slow head
    motion are random.

    Args:
        utterance: what is said, F frames of it.
        emotion: 0 to 7, an index into `memo_core.release.EMOTIONS`.
        rng: the same state gives the same performance.

    Returns:
        motion [F, 10] float32, columns and ranges as in `MOTION`.

    Raises:
        ValueError: if `emotion` has no signature, or the utterance's tracks are empty or differ in length.
    """
    if not 0 <= emotion < len(SIGNATURES):
        raise ValueError(f"emotion must be 0 to {len(SIGNATURES) - 1}, got {emotion}")
    mouth_open = np.asarray(utterance.mouth_open, dtype=np.float64)
    mouth_width = np.asarray(utterance.mouth_width, dtype=np.float64)
    frames = len(mouth_open)
    if frames == 0 or mouth_width.shape != mouth_open.shape:
        raise ValueError(f"mouth_open {mouth_open.shape} and mouth_width {mouth_width.shape} must be equal, not empty")

    energy = _smooth(mouth_open, 0.4)
    energy = energy - energy.mean()
    strength = rng.uniform(0.85, 1.0)
    track = {
        name: strength * value + rng.uniform(-0.05, 0.05) + 0.05 * _drift(rng, frames, 0.8)
        for name, value in zip(SIGNATURE_COLUMNS, SIGNATURES[emotion], strict=True)
    }
    # Wide or narrow eyes are as far from the relaxed eye as the emotion is strong.
    track["lids"] += (1.0 - strength) * RELAXED_LIDS
    track["brow_raise"] += 0.25 * energy
    track["head_tilt"] += 0.08 * _drift(rng, frames, 1.2) + 0.12 * energy * rng.choice((-1.0, 1.0))
    track["head_turn"] = 0.25 * _drift(rng, frames, 1.5) + 0.15 * energy * rng.choice((-1.0, 1.0))

    # Glances: quick steps, held, back to the viewer about half of the time.
    glance = np.zeros((2, frames))
    at = 0
    while at < frames:
        hold = round(rng.uniform(0.5, 1.6) * FPS)
        if rng.random() < 0.5:
            glance[:, at : at + hold] = rng.uniform((-0.8, -0.4), (0.8, 0.5))[:, None]
        at += hold
    track["gaze_x"], track["gaze_y"] = _smooth(glance[0], 0.07), _smooth(glance[1], 0.07)

    # Blinks multiply the lids; at most one in half a second.
    shut = np.ones(frames)
    at = int(rng.integers(FPS))
    while at < frames:
        length = min(len(BLINK_LIDS), frames - at)
        shut[at : at + length] = BLINK_LIDS[:length]
        at += FPS // 2 + round(rng.exponential(1.0 / BLINKS_PER_SECOND[emotion]) * FPS)
    track["lids"] = np.clip(track["lids"], 0.0, 1.0) * shut
    track["mouth_open"], track["mouth_width"] = mouth_open, mouth_width

    motion = np.stack([np.clip(track[name], -1.0, 1.0) for name in MOTION], axis=1)
    return torch.from_numpy(motion.astype(np.float32))


# --- The portrait -----------------------------------------------------------------------------------------------------


def default_portrait(size: int = 512) -> Tensor:
    """The face the project ships: uint8 [3, size, size], an identity that no training seed draws."""
    identity = sample_identity(np.random.default_rng(PORTRAIT_SEED))
    return render(identity, neutral_motion()[None], size)[0]
