"""Pictures of somebody at every row of a motion track: ellipsoids in parallel projection, painted, lit and antialiased.

A head is a few ellipsoids, of which each pixel's nearest point and normal are known in closed form. What lies on the
face (eyes, mouth, marks) is painted from distances in the head's own coordinates of that point, so that it turns with
the head; glasses and hair behind lie in planes of the head. Light comes from one side, with a rim from behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from .identity import HAIR, Colour, Identity, mix, scaled

MOTION = (
    "mouth_open",  # [0, 1]: 0 closed, 1 wide open
    "mouth_width",  # [-1, 1]: -1 pursed, 1 spread
    "mouth_corners",  # [-1, 1]: -1 frown, 1 smile
    "brow_raise",  # [-1, 1]: -1 lowered, 1 raised
    "brow_slant",  # [-1, 1]: -1 inner ends down (anger), 1 inner ends up (worry)
    "lids",  # [0, 1]: 0 closed, 0.8 relaxed, 1 wide open
    "gaze_x",  # [-1, 1]: 1 to the viewer's right
    "gaze_y",  # [-1, 1]: 1 down
    "yaw",  # degrees, [-30, 30]: positive turns the face to the viewer's right
    "pitch",  # degrees, [-20, 20]: positive looks up
    "roll",  # degrees, [-20, 20]: positive tips the top of the head to the viewer's right
    "shift_x",  # design units, [-8, 8]: the head moves to the viewer's right
    "shift_y",  # design units, [-6, 6]: down
    "swing",  # [-1, 1]: hair and earrings hang to the viewer's left (-1) or right
)
"""Names of the motion parameters, in the order of a motion track's last axis."""

LIMITS: dict[str, tuple[float, float]] = dict.fromkeys(MOTION, (-1.0, 1.0)) | {
    "mouth_open": (0.0, 1.0),
    "lids": (0.0, 1.0),
    "yaw": (-30.0, 30.0),
    "pitch": (-20.0, 20.0),
    "roll": (-20.0, 20.0),
    "shift_x": (-8.0, 8.0),
    "shift_y": (-6.0, 6.0),
}
"""Range of each of them; what lies outside is drawn as the nearest value inside."""

DESIGN = 128.0
HEAD_X, HEAD_Y = 64.0, 60.0
NECK_Y = 34.0  # the head turns about this point of its own vertical axis
RELAXED_LIDS = 0.8
JAW_DROP = 4.0
MOUTH_OPENING = 25.0
CORNER_LIFT = 7.5
REST_LIFT = 1.6  # a mouth at rest is friendly
BROW_LIFT = 5.5
BROW_ANGLE = 0.5
REST_SLANT = 0.1
GAZE_X, GAZE_Y = 3.4, 2.8
SWING = 7.0  # how far the ends of long hair go
WHITE: Colour = (1.0, 1.0, 1.0)


def neutral_motion() -> Tensor:
    """A motion row [14]: mouth closed, eyes open and straight ahead, head frontal, upright and still."""
    motion = torch.zeros(len(MOTION))
    motion[MOTION.index("lids")] = RELAXED_LIDS
    return motion


def portrait_motion(identity: Identity) -> Tensor:
    """The motion row [14] of somebody's portrait: `neutral_motion`, for some with the eyes shut."""
    motion = neutral_motion()
    if identity.eyes_shut:
        motion[MOTION.index("lids")] = 0.0
    return motion


# --- Surfaces ---------------------------------------------------------------------------------------------------------


@dataclass
class _Surface:
    """What is seen of a body: signed distance to its outline and depth [F, H, W], and the normal's three parts."""

    distance: Tensor
    depth: Tensor
    normal: tuple[Tensor, Tensor, Tensor]


class _View:
    """Pixels, and where the head is in every frame.

    Args:
        x, y: the pixels' centres in design units, [1, W] and [H, 1].
        rotation: [F, 3, 3], from the head's coordinates to the picture's.
        shift: [F, 3], where the head's origin goes.
    """

    def __init__(self, x: Tensor, y: Tensor, rotation: Tensor, shift: Tensor, scale: float):
        self.x, self.y, self.rotation, self.shift, self.scale = x, y, rotation, shift, scale

    def crop(self, box: tuple[slice, slice]) -> _View:
        rows, columns = box
        return _View(self.x[:, columns], self.y[rows], self.rotation, self.shift, self.scale)

    def box(self, points: list[tuple[float, float, float]], margin: float) -> tuple[slice, slice]:
        """The pixels within `margin` of these points of the head, in any frame."""
        at = torch.tensor(points, dtype=torch.float32)
        seen = torch.einsum("fij,pj->fpi", self.rotation, at) + self.shift[:, None]
        low = (seen[..., :2].amin(dim=(0, 1)) - margin).tolist()
        high = (seen[..., :2].amax(dim=(0, 1)) + margin).tolist()
        size = (self.x.shape[1], self.y.shape[0])
        first = (float(self.x[0, 0]), float(self.y[0, 0]))
        spans = [
            slice(
                min(size[axis] - 1, max(0, math.floor((low[axis] - first[axis]) * self.scale))),
                max(1, min(size[axis], math.ceil((high[axis] - first[axis]) * self.scale) + 1)),
            )
            for axis in (0, 1)
        ]
        return spans[1], spans[0]

    def _part(self, i: int, j: int) -> Tensor:
        return self.rotation[:, i, j, None, None]

    def ellipsoid(self, centre: tuple, radii: tuple) -> _Surface:
        """The near side of an ellipsoid along the head's axes; centre and radii in its coordinates, floats or [F]."""
        frames = len(self.rotation)

        def column(values: tuple) -> Tensor:
            return torch.stack([torch.as_tensor(v, dtype=torch.float32).expand(frames) for v in values], dim=1)

        middle = torch.einsum("fij,fj->fi", self.rotation, column(centre)) + self.shift
        q = torch.einsum("fij,fj,fkj->fik", self.rotation, column(radii) ** -2, self.rotation)
        q = q[..., None, None]
        u, v = self.x - middle[:, 0, None, None], self.y - middle[:, 1, None, None]
        # The ray's quadratic in depth; its outline is an ellipse.
        a, b, c = (q[:, i, j] - q[:, i, 2] * q[:, j, 2] / q[:, 2, 2] for i, j in ((0, 0), (0, 1), (1, 1)))
        du, dv = a * u + b * v, b * u + c * v
        square = (u * du).add_(v * dv)
        root = square.sqrt()
        length = du.square_().add_(dv.square_()).sqrt_().clamp_(min=1e-6)
        distance = (root - 1.0).mul_(root).div_(length)
        towards = q[:, 0, 2] * u + q[:, 1, 2] * v
        depth = ((q[:, 2, 2] * (1.0 - square).clamp_(min=0.0)).sqrt_() - towards) / q[:, 2, 2]
        normal = [q[:, 0, i] * u + q[:, 1, i] * v + q[:, 2, i] * depth for i in range(3)]
        norm = torch.rsqrt(sum(part.square() for part in normal).clamp_(min=1e-12))
        # Beyond the outline it falls away, so that whatever is there lies in front.
        depth = depth + middle[:, 2, None, None] - distance.clamp(min=0.0).mul_(3.0)
        return _Surface(distance, depth, (normal[0] * norm, normal[1] * norm, normal[2] * norm))

    def on_head(self, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The head's coordinates of what is seen at these depths."""
        u, v, w = self.x - self.shift[:, 0, None, None], self.y - self.shift[:, 1, None, None], None
        w = depth - self.shift[:, 2, None, None]
        x, y, z = (self._part(0, i) * u + self._part(1, i) * v + self._part(2, i) * w for i in range(3))
        return x, y, z

    def plane(self, z: float) -> tuple[Tensor, Tensor]:
        """The head's x and y of the points of the plane at that z."""
        u = self.x - self.shift[:, 0, None, None] - self._part(0, 2) * z
        v = self.y - self.shift[:, 1, None, None] - self._part(1, 2) * z
        determinant = self._part(0, 0) * self._part(1, 1) - self._part(0, 1) * self._part(1, 0)
        x = (self._part(1, 1) * u - self._part(0, 1) * v) / determinant
        y = (self._part(0, 0) * v - self._part(1, 0) * u) / determinant
        return x, y


def _blend(a: _Surface, b: _Surface, width: float) -> _Surface:
    """Both bodies as one, with a fillet of that width between them."""
    weight = ((a.depth - b.depth) / (2.0 * width) + 0.5).clamp_(0.0, 1.0)
    bulge = weight * (1.0 - weight) * width
    depth = torch.lerp(b.depth, a.depth, weight).add_(bulge)
    normal = [torch.lerp(q, p, weight) for p, q in zip(a.normal, b.normal)]
    norm = torch.rsqrt(sum(part.square() for part in normal).clamp_(min=1e-12))
    nearer = ((b.distance - a.distance) / (2.0 * width) + 0.5).clamp_(0.0, 1.0)
    distance = torch.lerp(b.distance, a.distance, nearer).sub_(nearer * (1.0 - nearer) * width)
    return _Surface(distance, depth, (normal[0] * norm, normal[1] * norm, normal[2] * norm))


class _Canvas:
    """Colours [F, 3, H, W] under construction."""

    def __init__(self, pixels: Tensor, scale: float):
        self.pixels, self.scale = pixels, scale

    @classmethod
    def of(cls, colour: Colour, like: Tensor, scale: float) -> _Canvas:
        """One colour everywhere, frames and size of `like` [F, H, W]."""
        pixels = torch.empty(len(like), 3, *like.shape[1:])
        for channel in range(3):
            pixels[:, channel] = colour[channel]
        return cls(pixels, scale)

    def coverage(self, distance: Tensor) -> Tensor:
        """How much of each pixel lies inside, from signed distances in design units."""
        return (0.5 - distance * self.scale).clamp_(0.0, 1.0)

    def paint(self, coverage: Tensor, colour: Colour) -> None:
        for channel in range(3):
            plane = self.pixels[:, channel]
            plane.addcmul_(coverage, colour[channel] - plane)

    def put(self, coverage: Tensor, layer: Tensor) -> None:
        """Lay pictures [F, 3, H, W] over this one."""
        self.pixels.lerp_(layer, coverage[:, None])

    def crop(self, box: tuple[slice, slice]) -> _Canvas:
        return _Canvas(self.pixels[:, :, box[0], box[1]], self.scale)


def _ellipse(x: Tensor, y: Tensor, radius_x: Tensor | float, radius_y: Tensor | float) -> Tensor:
    """Signed distance to an ellipse, exact to first order near its edge."""
    x, y = x / radius_x, y / radius_y
    inside = torch.sqrt(x * x + y * y)
    slope = torch.sqrt((x / radius_x).square_().add_((y / radius_y).square_())).clamp_(min=1e-6)
    return (inside - 1.0).mul_(inside).div_(slope)


def _circle(x: Tensor, y: Tensor, radius: float) -> Tensor:
    return torch.sqrt(x.square() + y.square()).sub_(radius)


def _capsule(x: Tensor, y: Tensor, a: tuple[float, float], b: tuple[float, float], radius: float) -> Tensor:
    """Signed distance to the line from a to b, so thick."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = (((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy)).clamp_(0.0, 1.0)
    return torch.sqrt((x - a[0] - along * dx).square_().add_((y - a[1] - along * dy).square_())).sub_(radius)


class _Light:
    """One lamp from the side, one from behind; multiplies colours."""

    def __init__(self, identity: Identity):
        length = math.sqrt(identity.light_x**2 + identity.light_y**2 + 0.6**2)
        self.lamp = (identity.light_x / length, identity.light_y / length, 0.6 / length)
        self.strength, self.rim = identity.light, identity.rim
        self.back = -1.0 if identity.light_x > 0 else 1.0

    def shade(self, layer: Tensor, normal: tuple[Tensor, Tensor, Tensor], gloss: float = 0.0) -> None:
        """Lights a layer [F, 3, H, W] in place."""
        lit = (self.lamp[0] * normal[0]).add_(self.lamp[1] * normal[1]).add_(self.lamp[2] * normal[2])
        soft = (lit * 0.62 + 0.46).clamp_(0.0, 1.0)
        soft = soft.square() * (3.0 - 2.0 * soft)
        rim = ((1.0 - normal[2]).clamp_(0.0, 1.0).square_()).mul_((normal[0] * self.back).clamp_(min=0.0)).mul_(0.55)
        dark = (1.0 - self.strength, 1.0 - 1.12 * self.strength, 1.0 - self.strength)
        for channel in range(3):
            plane = layer[:, channel]
            low = max(0.2, dark[channel])
            plane.mul_(soft * (1.04 - low) + low)
            plane.addcmul_(rim, self.rim[channel] - plane)
        if gloss:
            shine = lit.clamp(min=0.0).pow_(24).mul_(gloss)
            layer.add_(shine[:, None])


# --- What never moves -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Design coordinates of the pixels' centres, x [1, size] and y [size, 1]."""
    centres = (torch.arange(size, dtype=torch.float32) + 0.5) * (DESIGN / size)
    return centres[None, :], centres[:, None]


def _wall(identity: Identity, size: int) -> Tensor:
    """[1, 3, H, W]."""
    x, y = _grid(size)
    x, y = x.expand(size, size), y.expand(size, size)
    top, bottom = torch.tensor(identity.wall_top), torch.tensor(identity.wall_bottom)
    canvas = _Canvas(torch.lerp(top[:, None, None], bottom[:, None, None], y / DESIGN)[None].clone(), size / DESIGN)
    light, dark = mix(identity.wall_top, WHITE, 0.35), scaled(identity.wall_bottom, 0.86)
    pattern = identity.wall_pattern
    if pattern == "dots":
        row = torch.floor(y / 11.0)
        dots = _circle((x + 5.5 * row.remainder(2.0)).remainder(11.0) - 5.5, y.remainder(11.0) - 5.5, 2.2)
        canvas.paint(canvas.coverage(dots)[None] * 0.6, light)
    elif pattern == "stripes":
        canvas.paint(canvas.coverage((x.remainder(16.0) - 8.0).abs() - 4.0)[None] * 0.35, light)
    elif pattern == "waves":
        wave = (y + 4.0 * torch.sin(x * (2 * math.pi / 32.0))).remainder(14.0) - 7.0
        canvas.paint(canvas.coverage(wave.abs() - 2.2)[None] * 0.4, light)
    elif pattern == "checks":
        cell = (torch.floor(x / 16.0) + torch.floor(y / 16.0)).remainder(2.0)
        canvas.paint(cell[None] * 0.16, dark)
    elif pattern == "rays":
        angle = torch.atan2(y - 56.0, x - 64.0) * (18.0 / (2 * math.pi))
        reach = torch.sqrt((x - 64.0).square() + (y - 56.0).square()).clamp(min=1.0)
        edge = ((angle.remainder(1.0) - 0.5).abs() - 0.25) * reach * (2 * math.pi / 18.0)
        canvas.paint(canvas.coverage(edge)[None] * 0.4, light)
    elif pattern == "lights":
        rng = np.random.default_rng(int(1e6 * identity.face_width) % 2**31)
        for _ in range(9):
            at, radius = rng.uniform(0.0, DESIGN, 2), rng.uniform(5.0, 13.0)
            spot = torch.sqrt((x - at[0]).square() + (y - at[1]).square()) - radius
            canvas.paint((0.5 - spot / 3.0).clamp(0.0, 1.0)[None] * 0.28, light)
    if identity.wall_picture:
        px, py = (x - HEAD_X - identity.wall_picture)[None], (y - 44.0)[None]
        frame = torch.maximum(px.abs() - 17.0, py.abs() - 21.0)
        canvas.paint((0.5 - frame / 5.0).clamp(0.0, 0.35), dark)  # its shadow
        canvas.paint(canvas.coverage(frame), (0.30, 0.21, 0.16))
        canvas.paint(canvas.coverage(frame + 2.2), (0.96, 0.94, 0.88))
        canvas.paint(canvas.coverage(frame + 4.6), mix(identity.wall_picture_colour, WHITE, 0.55))
        inside = canvas.coverage(frame + 4.6)
        hill = py - 4.0 + 5.0 * torch.sin(px * 0.35)
        canvas.paint(canvas.coverage(-hill) * inside, identity.wall_picture_colour)
        sun = _circle(px + 0.35 * identity.wall_picture / abs(identity.wall_picture) * 12.0, py + 8.0, 3.6)
        canvas.paint(canvas.coverage(sun) * inside, (0.98, 0.62, 0.35))
    glow = (1.0 - torch.sqrt((x - 64.0).square() + (y - 56.0).square()) / 84.0).clamp(min=0.0) * 0.10
    corner = (torch.sqrt((x - 64.0).square() + (y - 64.0).square()) / 90.0).clamp(max=1.0) ** 3 * 0.18
    return (canvas.pixels + glow).mul_(1.0 - corner)


@lru_cache(maxsize=32)
def _backdrop(identity: Identity, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The wall [1, 3, H, W], the body's colours [1, 3, H, W] and how much of each pixel it covers [1, H, W]."""
    x, y = _grid(size)
    x, y = (x.expand(size, size) - HEAD_X)[None], y.expand(size, size)[None]
    scale = size / DESIGN
    shoulders = _ellipse(x, y - 153.0, 60.0, 45.0)
    neck = torch.maximum(x.abs() - 13.0 - 0.004 * (y - 96.0).square(), 80.0 - y)
    body = _Canvas.of(identity.clothes, shoulders, scale)
    cover = torch.maximum(body.coverage(shoulders), body.coverage(neck))
    style, trim, skin = identity.clothes_style, identity.trim, identity.skin
    if style == "stripes":
        body.paint(body.coverage(((y - 112.0 + 0.003 * x.square()).remainder(9.0) - 4.5).abs() - 2.1), trim)
    if style == "hood":
        body.paint(body.coverage(_ellipse(x, y - 112.0, 30.0, 12.0)), scaled(identity.clothes, 0.82))
        for side in (-1.0, 1.0):
            cord = _capsule(x, y, (side * 9.0, 116.0), (side * 8.0, 127.0), 1.0)
            body.paint(body.coverage(cord), trim)
    if style == "v-neck":
        neckline = x.abs() * 0.8 + (y - 127.0) * 0.6
    elif style == "turtleneck":
        neckline = torch.maximum(neck, y - 101.0)
    else:
        neckline = _ellipse(x, y - 106.0, 18.5, 10.5)
    if style in ("crew", "v-neck"):
        body.paint(body.coverage(neckline - 2.6), trim)
    bare = torch.minimum(neckline, torch.maximum(neck, y - 112.0)) if style != "turtleneck" else neckline
    body.paint(body.coverage(bare), scaled(skin, 0.95))
    # Round shoulders and neck, lit as the head is; the head's shadow on the neck.
    side = (x / 60.0).clamp(-1.0, 1.0)
    normal = (side, torch.full_like(x, -0.25), torch.sqrt(1.0 - side.square()).clamp(min=0.3))
    _Light(identity).shade(body.pixels, normal)
    shadow = ((114.0 - y) / 12.0).clamp(0.0, 1.0) * 0.55
    body.paint(shadow * body.coverage(torch.minimum(neckline, neck)), scaled(mix(skin, (0.5, 0.2, 0.2), 0.2), 0.5))
    if style == "collar":
        for side_of in (-1.0, 1.0):
            cx, cy = x * side_of - 11.0, y - 117.0
            flap = torch.maximum((cx - 0.5 * cy).abs() * 0.9 - 6.0, (cy + 0.35 * cx).abs() - 6.5)
            body.paint(body.coverage(flap - 0.8), scaled(trim, 0.72))
            body.paint(body.coverage(flap), trim)
    return _wall(identity, size), body.pixels, cover


# --- The head ---------------------------------------------------------------------------------------------------------


class _Drawing:
    """One chunk of frames of somebody."""

    def __init__(self, identity: Identity, motion: Tensor, size: int):
        self.identity, self.size, self.scale = identity, size, size / DESIGN
        self.row = {name: motion[:, i, None, None] for i, name in enumerate(MOTION)}
        self.column = {name: motion[:, i] for i, name in enumerate(MOTION)}
        yaw, pitch, roll = (torch.deg2rad(self.column[name]) for name in ("yaw", "pitch", "roll"))
        rotation = _about_z(roll) @ _about_x(pitch) @ _about_y(yaw)
        neck = torch.tensor([0.0, NECK_Y, 0.0])
        shift = neck - rotation @ neck
        shift[:, 0] += HEAD_X + self.column["shift_x"]
        shift[:, 1] += HEAD_Y + self.column["shift_y"]
        self.view = _View(*_grid(size), rotation, shift, self.scale)
        self.light = _Light(identity)
        self.hair = HAIR[identity.hair_style]

    @cached_property
    def canvas(self) -> _Canvas:
        wall, _, _ = _backdrop(self.identity, self.size)
        return _Canvas(wall.repeat(len(self.view.rotation), 1, 1, 1), self.scale)

    def draw(self) -> Tensor:
        """[F, 3, H, W] in [0, 1]."""
        identity = self.identity
        self._hair_behind()
        _, body, cover = _backdrop(identity, self.size)
        self.canvas.put(cover, body)
        if identity.kind == "cat":
            self._cat_ears()
        if identity.kind == "robot":
            self._antenna()
        if identity.kind != "cat":
            for side in (-1.0, 1.0):
                self._ear(side)
        self._face()
        if identity.kind == "human":
            self._nose()
        if identity.hair_style != "bald":
            self._hair()
        if identity.earring is not None:
            for side in (-1.0, 1.0):
                self._earring(side)
        if identity.kind == "cat":
            self._whiskers()
        if identity.glasses != "none" and identity.kind == "human":
            self._glasses()
        return self.canvas.pixels

    # Behind the face

    def _hair_behind(self) -> None:
        style, identity = self.hair, self.identity
        x, y = self.view.plane(-16.0)
        x = x - self.row["swing"] * SWING * ((y + 6.0) / 60.0).clamp_(0.0, 1.2).pow_(1.4)
        shapes: list[Tensor] = []
        if style.back_width > 0.0:
            half = identity.face_width + style.back_width
            top = -identity.cranium - style.volume + 2.0
            if style.scallops and style.back_bottom < 30.0:
                shapes.append(_wavy(_circle(x, y + 6.0, half), x, y + 6.0, style.scallops, style.bump))
            else:
                if style.scallops:  # wavy ends
                    x = x + style.bump * 0.6 * torch.sin(y * 0.32)
                below = (y - (top + half)).clamp_(min=0.0).sub_(style.back_bottom - top - half)
                above = (top + half - y).clamp_(min=0.0)
                shapes.append(torch.maximum(torch.sqrt(x * x + above * above).sub_(half), below))
        for bun_x, bun_y, radius in style.buns:
            side = x.abs() - (identity.face_width + bun_x) if bun_x else x
            shapes.append(_circle(side, y - bun_y, radius))
        if not shapes:
            return
        distance = shapes[0]
        for shape in shapes[1:]:
            distance = torch.minimum(distance, shape)
        canvas = self.canvas
        cover = canvas.coverage(distance)
        canvas.paint(cover, scaled(identity.hair, 0.72))
        strands = torch.sin(x * 1.1 + 0.08 * y).mul_(0.5).add_(0.5).mul_(cover).mul_(0.3)
        canvas.paint(strands, scaled(identity.hair, 0.9))
        canvas.paint(
            (distance / 6.0 + 1.0).clamp_(0.0, 1.0).square_().mul_(cover).mul_(0.35), scaled(identity.hair, 0.5)
        )

    def _lit_body(self, view: _View, surface: _Surface, box: tuple[slice, slice], colour: Colour, gloss: float) -> None:
        layer = _Canvas.of(colour, surface.distance, self.scale)
        self.light.shade(layer.pixels, surface.normal, gloss)
        canvas = self.canvas.crop(box)
        canvas.put(canvas.coverage(surface.distance), layer.pixels)

    def _ear(self, side: float) -> None:
        identity = self.identity
        at = (side * (identity.face_width + 0.5), 4.0, -3.0)
        big = identity.ear
        box = self.view.box([at], 12.0 * big)
        view = self.view.crop(box)
        if identity.kind == "robot":
            self._lit_body(view, view.ellipsoid(at, (4.5, 8.0, 8.0)), box, scaled(identity.skin, 0.75), 0.5)
            return
        outer = view.ellipsoid(at, (4.6 * big, 8.4 * big, 5.5 * big))
        self._lit_body(view, outer, box, scaled(identity.skin, 0.96), 0.05)
        inner = view.ellipsoid((at[0] + side, at[1], at[2] + 3.0), (2.4 * big, 4.8 * big, 3.2 * big))
        canvas = self.canvas.crop(box)
        cover = canvas.coverage(inner.distance).mul_(canvas.coverage(outer.distance)).mul_(0.55)
        canvas.paint(cover, scaled(mix(identity.skin, (0.8, 0.3, 0.28), 0.3), 0.72))

    def _cat_ears(self) -> None:
        identity = self.identity
        x, y = self.view.plane(-4.0)
        x = x.abs()
        canvas = self.canvas
        # a triangle with a round tip
        left, right = (x - 11.0) * -0.93 - (y + 56.0) * 0.36, (x - 36.0) * 0.86 - (y + 30.0) * 0.5
        ear = torch.maximum(torch.maximum(left, right - 1.0), y + 20.0)
        canvas.paint(canvas.coverage(ear), scaled(identity.skin, 0.86))
        canvas.paint(canvas.coverage(ear + 4.0), mix(scaled(identity.skin, 0.9), (0.95, 0.55, 0.58), 0.6))

    def _antenna(self) -> None:
        identity = self.identity
        x, y = self.view.plane(0.0)
        x = x - self.row["swing"] * 4.0 * ((-identity.cranium - y) / 14.0).clamp_(0.0, 1.0)
        canvas = self.canvas
        top = -identity.cranium - 13.0
        canvas.paint(
            canvas.coverage(_capsule(x, y, (0.0, top), (0.0, -identity.cranium + 4.0), 1.4)), (0.35, 0.37, 0.42)
        )
        ball = _circle(x, y - top, 4.6)
        canvas.paint(canvas.coverage(ball), mix(identity.iris, WHITE, 0.1))
        canvas.paint(canvas.coverage(_circle(x + 1.4, y - top + 1.5, 1.4)), WHITE)

    # The face

    def _skull(self, view: _View) -> _Surface:
        identity, jaw = self.identity, JAW_DROP * self.column["mouth_open"]
        width = identity.face_width
        skull = view.ellipsoid((0.0, -2.0, 0.0), (width, identity.cranium - 2.0, width))
        drop = (identity.chin - 24.0) + jaw
        chin = view.ellipsoid(
            (0.0, drop * 0.5 + 6.0, 3.0), (width * (0.93 - identity.taper), 18.0 + drop * 0.5, width * 0.86)
        )
        return _blend(skull, chin, 6.0)

    def _face(self) -> None:
        identity = self.identity
        w, top, low = identity.face_width + 2.0, -identity.cranium - 2.0, identity.chin + JAW_DROP + 6.0
        corners = [(x, y, z) for y in (top, low) for x, z in ((w, 0.0), (-w, 0.0), (0.0, w), (0.0, -w))]
        box = self.view.box(corners, 1.0)
        view = self.view.crop(box)
        surface = self._skull(view)
        px, py, pz = view.on_head(surface.depth)
        layer = _Canvas.of(identity.skin, surface.distance, self.scale)
        self._skin(layer, px, py, pz)
        self._mouth(layer, px, py)
        self._eyes(layer, px, py)
        if identity.kind == "cat":
            self._cat_nose(layer, px, py)
        self.light.shade(layer.pixels, surface.normal, 0.35 if identity.kind == "robot" else 0.06)
        canvas = self.canvas.crop(box)
        canvas.put(canvas.coverage(surface.distance), layer.pixels)

    def _skin(self, layer: _Canvas, x: Tensor, y: Tensor, z: Tensor) -> None:
        """What lies on the skin but eyes and mouth."""
        identity = self.identity
        skin = identity.skin
        if identity.kind == "robot":
            seam = scaled(skin, 0.62)
            layer.paint(layer.coverage((x.abs() - 27.0 + 0.002 * (y - 8.0).square()).abs() - 0.6), seam)
            layer.paint(layer.coverage((y + identity.cranium * 0.58).abs() - 0.6), seam)
            for at in (-20.0, 20.0):
                layer.paint(layer.coverage(_circle(x - at, y + identity.cranium * 0.70, 1.6)), seam)
        elif identity.kind == "cat":
            pale = mix(skin, (1.0, 0.98, 0.95), 0.65)
            layer.paint(layer.coverage(_ellipse(x, y - identity.mouth_y + 1.0, 21.0, 15.0)), pale)
            stripes = torch.maximum((x.remainder(9.0) - 4.5).abs() - 1.5 + (y + 30.0) * 0.09, x.abs() - 13.0)
            layer.paint(layer.coverage(torch.maximum(stripes, y + 26.0)), scaled(skin, 0.6))
            sides = torch.maximum((y.remainder(8.0) - 4.0).abs() - 1.4, 24.0 - x.abs())
            layer.paint(layer.coverage(torch.maximum(sides, (y - 10.0).abs() - 14.0)), scaled(skin, 0.66))
        else:
            cheek = ((x.abs() - 23.0).square() + (y - identity.nose_y - 5.0).square()).mul_(1.0 / 90.0)
            rosy = mix(scaled(skin, 0.92), (0.93, 0.35, 0.34), 0.5)
            layer.paint((1.0 - cheek).clamp_(0.0, 1.0).mul_(identity.blush), rosy)
            if identity.freckles:
                rng = np.random.default_rng(int(1e6 * identity.freckles))
                for _ in range(9):
                    at_x, at_y = 21.0 + rng.normal(0.0, 5.0), identity.nose_y + rng.normal(2.0, 3.0)
                    dot = layer.coverage(_circle(x.abs() - at_x, y - at_y - 0.8 * torch.sign(x), 0.8))
                    layer.paint(dot.mul_(identity.freckles), scaled(mix(skin, (0.6, 0.25, 0.1), 0.4), 0.8))
            if identity.age > 0.15:
                self._wrinkles(layer, x, y)
            if identity.beard != "none":
                self._beard(layer, x, y)
        if identity.cheek != "none":
            self._cheek_mark(layer, x, y, z)

    def _wrinkles(self, layer: _Canvas, x: Tensor, y: Tensor) -> None:
        identity = self.identity
        dark, strong = scaled(mix(identity.skin, (0.55, 0.25, 0.2), 0.25), 0.78), 0.65 * identity.age
        lift = 2.0 * self.row["brow_raise"]
        for number in (0, 1):
            arc = (y - identity.brow_y + 7.0 + 4.5 * number + lift - 0.004 * x.square()).abs() - 0.45
            layer.paint(layer.coverage(torch.maximum(arc, x.abs() - 13.0 + 2.0 * number)).mul_(strong), dark)
        # from nose to mouth
        fold_x, fold_y = x.abs() - identity.nose_width - 4.0, y - identity.nose_y - 6.0
        fold = torch.maximum((fold_x - 0.6 * fold_y - 0.03 * fold_y.square()).abs().mul_(0.8) - 0.3, fold_y.abs() - 5.0)
        layer.paint((0.5 - fold / 1.6).clamp_(0.0, 1.0).mul_(0.6 * strong), dark)
        bag = _ellipse(
            x.abs() - identity.eye_spacing, y - identity.eye_y - 3.0, identity.eye_width, identity.eye_height
        )
        below = ((y - identity.eye_y - 5.0) / 4.0).clamp_(0.0, 1.0)
        layer.paint((1.2 - (bag - 1.5).abs() / 1.2).clamp_(0.0, 1.0).mul_(below).mul_(0.8 * strong), dark)

    def _beard(self, layer: _Canvas, x: Tensor, y: Tensor) -> None:
        identity = self.identity
        colour, ax = scaled(identity.hair, 0.88), x.abs()
        lips = _ellipse(x, y - identity.mouth_y - 3.0 * self.row["mouth_open"], identity.mouth_width + 1.5, 6.0)
        moustache = _ellipse(ax - 7.5, y - identity.mouth_y + 7.0 + 0.10 * ax, 9.0, 3.0)
        if identity.beard == "moustache":
            shape, strength = moustache, 1.0
        elif identity.beard == "goatee":
            shape = _ellipse(x, y - identity.mouth_y - 14.0, 8.5 - 0.1 * (y - identity.mouth_y), 14.0)
            shape, strength = torch.maximum(torch.minimum(shape, moustache), -lips), 1.0
        else:
            jaw = 15.0 - y - 1.35 * (ax - 22.0).clamp_(min=0.0)
            shape = torch.maximum(torch.minimum(jaw, moustache), -lips)
            strength = 1.0 if identity.beard == "full" else 0.34
        layer.paint(layer.coverage(shape).mul_(strength), colour)
        if strength == 1.0:
            strands = torch.sin(2.4 * x + 0.5 * torch.sin(y)).mul_(0.5).add_(0.5).mul_(layer.coverage(shape)).mul_(0.25)
            layer.paint(strands, scaled(colour, 1.35))

    def _cheek_mark(self, layer: _Canvas, x: Tensor, y: Tensor, z: Tensor) -> None:
        """So far to the side that a frontal view shows next to nothing of it."""
        identity, side = self.identity, self.identity.cheek_side
        around = (torch.atan2(side * x, z) - 1.46) * identity.face_width  # along the surface, from 84 degrees on
        up = y - 14.0
        if identity.cheek == "mole":
            layer.paint(layer.coverage(_circle(around, up, 2.6)), (0.24, 0.13, 0.10))
        elif identity.cheek == "plaster":
            u, v = 0.8 * around + 0.6 * up, 0.8 * up - 0.6 * around
            layer.paint(layer.coverage(torch.maximum(u.abs() - 7.0, v.abs() - 2.8)), (0.93, 0.45, 0.62))
            layer.paint(layer.coverage(torch.maximum(u.abs() - 2.2, v.abs() - 2.2)), (0.99, 0.82, 0.88))
        else:
            angle = torch.atan2(up, around)
            star = torch.sqrt(around.square() + up.square()) - 4.2 - 1.6 * torch.cos(5.0 * angle + 1.57)
            layer.paint(layer.coverage(star), (0.98, 0.80, 0.20))

    def _eyes(self, layer: _Canvas, x: Tensor, y: Tensor) -> None:
        """Eyes, lids and brows; both sides at once, in coordinates mirrored at the middle of the face."""
        identity, row = self.identity, self.row
        side, mirrored = torch.sign(x), x.abs()
        width, height = identity.eye_width, identity.eye_height
        robot, cat = identity.kind == "robot", identity.kind == "cat"
        eye_x, eye_y = mirrored - identity.eye_spacing, y - identity.eye_y
        if robot:
            corner = 4.0
            qx, qy = eye_x.abs() - (width - corner), eye_y.abs() - (height - corner)
            ball = torch.sqrt(qx.clamp(min=0.0).square_().add_(qy.clamp(min=0.0).square_())).sub_(corner)
            ball = ball.add_(torch.maximum(qx, qy).clamp_(max=0.0))
        else:
            ball = _ellipse(eye_x, eye_y, width, height)
        # The lid's edge is a parabola that slides from above the eye to its lower edge.
        edge = height * (2.02 * row["lids"] - 0.9)
        slope = (1.5 / width**2) * edge
        lid = (eye_y - edge * (0.75 * (eye_x / width).square_() - 1.0)).mul_(
            torch.rsqrt((slope * eye_x).square_().add_(1.0))
        )
        dark = mix(scaled(identity.hair, 0.4), (0.12, 0.08, 0.10), 0.6)
        ball_cover = layer.coverage(ball)
        layer.paint(layer.coverage(ball - 1.1), scaled(mix(identity.skin, (0.6, 0.25, 0.2), 0.15), 0.74))
        layer.paint(ball_cover, mix(scaled(identity.skin, 0.93), (0.80, 0.42, 0.38), 0.12))
        visible = layer.coverage(-lid).mul_(ball_cover)
        layer.paint(visible, (0.10, 0.14, 0.18) if robot else (0.99, 0.98, 0.96))
        # shadow of the lid on the eyeball
        layer.paint((1.0 - lid / 3.2).clamp_(0.0, 1.0).mul_(visible).mul_(0.28), (0.35, 0.30, 0.42))

        iris_x, iris_y = eye_x - side * (GAZE_X * row["gaze_x"]), eye_y - (GAZE_Y * row["gaze_y"] + 0.7)
        radius = identity.iris_radius * (1.2 if cat else 1.0)
        from_middle = torch.sqrt(iris_x.square().add_(iris_y.square()))
        iris = from_middle - radius
        layer.paint(layer.coverage(iris).mul_(visible), scaled(identity.iris, 0.5))
        layer.paint(layer.coverage(iris + 1.1).mul_(visible), identity.iris)
        bright = mix(identity.iris, WHITE, 0.45)
        lower = (iris_y / radius).clamp_(0.0, 1.0).mul_(layer.coverage(iris + 1.1)).mul_(visible)
        layer.paint(lower.mul_(0.8), bright)
        pupil = _ellipse(iris_x, iris_y, 1.5, 0.8 * radius) if cat else from_middle - 0.47 * radius
        layer.paint(layer.coverage(pupil).mul_(visible), WHITE if robot else (0.05, 0.04, 0.06))
        glint_x = iris_x + 2.2 * side * (-1.0 if identity.light_x > 0 else 1.0)
        glint = torch.sqrt(glint_x.square_().add_((iris_y + 2.5).square_()))
        layer.paint(layer.coverage(glint - 1.8).mul_(visible), WHITE)
        lash = layer.coverage(torch.maximum(lid.abs_().sub_(1.25), ball - 1.1))
        layer.paint(lash, scaled(identity.skin, 0.45) if robot else dark)
        if robot:
            self._brows(layer, mirrored, y, scaled(identity.skin, 0.5))
        else:
            self._brows(layer, mirrored, y, mix(scaled(identity.hair, 0.7), scaled(identity.skin, 0.35), 0.3))

    def _brows(self, layer: _Canvas, mirrored: Tensor, y: Tensor, colour: Colour) -> None:
        identity, row = self.identity, self.row
        x, y = mirrored - (identity.eye_spacing + 0.5), y - identity.brow_y + BROW_LIFT * row["brow_raise"]
        angle = BROW_ANGLE * (row["brow_slant"] + REST_SLANT)
        cosine, sine = torch.cos(angle), torch.sin(angle)
        along = (x * cosine).add_(y * sine)
        across = (y * cosine).sub_(x * sine)
        near = along.clamp(-identity.brow_length, identity.brow_length)
        across.sub_(near.square().mul_(2.2 / identity.brow_length**2)).add_(0.8)
        thickness = identity.brow_thickness * (1.0 - near * (0.35 / identity.brow_length))
        brow = torch.sqrt((along - near).square_().add_(across.square_())).sub_(thickness)
        layer.paint(layer.coverage(brow), colour)

    def _mouth(self, layer: _Canvas, x: Tensor, y: Tensor) -> None:
        """Between the corners the lips follow a parabola (smile or frown), parted by an ellipse's profile, mostly
        downwards.
        """
        identity, row = self.identity, self.row
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
        lips = layer.coverage(gap - identity.lip_thickness)
        layer.paint(lips, identity.lips if identity.kind != "robot" else scaled(identity.skin, 0.5))
        if identity.kind == "human":  # light on the lower lip, a shadow below it
            shine = (1.0 - ((middle - 0.7 * opening * profile - identity.lip_thickness * 0.6) / 1.4).square_()).clamp_(
                0.0
            )
            layer.paint(shine.mul_(lips).mul_(0.30 * (1.0 - square)), mix(identity.lips, WHITE, 0.6))
            under = _ellipse(x, y - identity.mouth_y - 7.0 - 0.7 * opening, 6.0, 1.6)
            layer.paint((0.5 - under / 2.5).clamp_(0.0, 1.0).mul_(0.18), scaled(identity.skin, 0.6))
        inside = layer.coverage(gap - 0.35)
        layer.paint(inside, (0.25, 0.06, 0.09) if identity.kind != "robot" else (0.10, 0.12, 0.16))
        if identity.kind == "robot":  # a lit grille
            bars = ((x.remainder(3.6) - 1.8).abs() - 0.7).clamp_(min=-2.0)
            layer.paint(layer.coverage(torch.maximum(bars, gap + 0.8)), mix(identity.iris, WHITE, 0.2))
            return
        tongue = _ellipse(x, middle - 0.74 * opening, 0.56 * width, 0.34 * opening + 0.1)
        red = (0.35, 0.45, 0.85) if identity.mouth == "blue tongue" else (0.89, 0.42, 0.43)
        layer.paint(layer.coverage(torch.maximum(tongue, gap + 0.9)), red)
        teeth = torch.maximum(below_upper - (0.27 * opening).clamp(max=6.0), gap + 0.7)
        white = layer.coverage(teeth)
        layer.paint(white, (0.98, 0.97, 0.94))
        if identity.mouth == "gap":
            layer.paint(layer.coverage(x.abs() - 1.1).mul_(white), (0.25, 0.06, 0.09))
        elif identity.mouth == "gold":
            layer.paint(layer.coverage((x - 3.4).abs() - 1.9).mul_(white), (0.95, 0.74, 0.22))

    def _cat_nose(self, layer: _Canvas, x: Tensor, y: Tensor) -> None:
        up = y - self.identity.nose_y - 1.0
        nose = torch.maximum(x.abs() * 0.75 + up * 0.66 - 3.4, -up - 2.6)
        layer.paint(layer.coverage(nose), (0.90, 0.50, 0.53))
        line = torch.maximum(x.abs() - 0.5, (up - 6.0).abs() - 3.5)
        layer.paint(layer.coverage(line).mul_(0.7), (0.35, 0.2, 0.2))

    # In front of the face

    def _nose(self) -> None:
        identity = self.identity
        width, length = identity.nose_width, identity.nose_length
        at = (0.0, identity.nose_y - 1.0, identity.face_width * 0.93)
        box = self.view.box([at], 2.2 * length + 4.0)
        view = self.view.crop(box)
        tip = view.ellipsoid(at, (width, 4.2, 0.9 * length))
        bridge = view.ellipsoid((0.0, at[1] - 0.75 * length, at[2] - 2.2), (width * 0.5, length, 4.5))
        surface = _blend(tip, bridge, 4.0)
        skin = mix(identity.skin, (0.92, 0.42, 0.36), 0.12)
        layer = _Canvas.of(skin, surface.distance, self.scale)
        self.light.shade(layer.pixels, surface.normal, 0.10)
        canvas = self.canvas.crop(box)
        # Its outline fades towards the brows, where it grows out of the face, and is drawn below the tip.
        _, py = view.plane(at[2])
        fade = ((py - (at[1] - 1.1 * length)) / (0.9 * length)).clamp_(0.0, 1.0)
        under = view.ellipsoid((at[0], at[1] + 1.6, at[2] - 4.0), (width + 0.8, 4.0, 4.0))
        canvas.paint(canvas.coverage(under.distance - 0.4).mul_(0.45).mul_(fade), scaled(skin, 0.60))
        canvas.put(canvas.coverage(surface.distance).mul_(fade), layer.pixels)

    def _hair(self) -> None:
        """The shell around the skull, minus the window, above the cut."""
        style, identity = self.hair, self.identity
        view, canvas = self.view, self.canvas
        grown = identity.face_width + style.volume
        cap = view.ellipsoid((0.0, -4.0, -1.5), (grown, identity.cranium - 4.0 + style.volume, grown))
        x, y, z = view.on_head(cap.depth)
        distance = cap.distance
        if style.bump:
            distance = _wavy(distance, x, y + 4.0, style.scallops, style.bump)
        window_y = y - style.window_y
        if style.shear:
            window_y = window_y + x * (style.shear * identity.parting)
        if style.zigzag:
            window_y = window_y + (x / 11.0).remainder(1.0).sub_(0.5).abs_().mul_(2.0 * style.zigzag)
        # The window is cut into the front of the shell.
        window_x = (x - style.window_x * identity.parting) / (identity.face_width + style.window_width)
        behind = (7.0 - z).clamp_(min=0.0).mul_(0.12).mul_((x.abs() / 16.0 - 0.6).clamp_(0.0, 1.0))
        window_x, window_y = window_x.square_().add_(behind), (window_y / style.window_height).square_()
        if style.window_square:
            window = torch.sqrt(torch.sqrt(window_x.square_().add_(window_y.square_())))
        else:
            window = torch.sqrt(window_x.add_(window_y))
        window = window.sub_(1.0).mul_(34.0)
        # Hanging sides swing a little.
        cut = y - style.cut
        if style.hangs:
            cut = cut - 1.5 * self.row["swing"] * torch.sign(x)
        shape = torch.maximum(torch.maximum(distance, -window), cut)
        colour = mix(identity.skin, identity.hair, style.tint)
        skin_shadow = (window / 5.0 + 1.0).clamp_(0.0, 1.0).mul_(canvas.coverage(torch.maximum(distance + 5.0, cut)))
        canvas.paint(skin_shadow.mul_(0.30), scaled(mix(identity.skin, identity.hair, 0.3), 0.45))
        layer = _Canvas.of(colour, shape, self.scale)
        strands = torch.sin(torch.atan2(x - 6.0 * identity.parting, 30.0 - y) * 46.0).mul_(0.5).add_(0.5)
        layer.paint(strands.mul_(0.22 * style.tint), scaled(colour, 0.72))
        self.light.shade(layer.pixels, cap.normal, 0.12)
        band = (1.0 - ((y + 0.62 * identity.cranium + 0.004 * x.square()) / 5.0).square_()).clamp_(0.0, 1.0)
        layer.paint(band.mul_(0.20 * style.tint).mul_(0.6 + 0.4 * strands), mix(colour, WHITE, 0.75))
        canvas.put(canvas.coverage(shape), layer.pixels)

    def _earring(self, side: float) -> None:
        """From the lobe; hair that hangs over it hides it until it swings away."""
        identity = self.identity
        at = (side * (identity.face_width + 1.5), 4.0 + 8.5 * identity.ear, -2.0)
        box = self.view.box([at], 16.0)
        view, canvas = self.view.crop(box), self.canvas.crop(box)
        lobe = torch.einsum("fij,j->fi", view.rotation, torch.tensor(at)) + view.shift
        swing = self.column["swing"] * 0.75
        u = view.x - lobe[:, 0, None, None] - (6.0 * torch.sin(swing))[:, None, None]
        v = view.y - lobe[:, 1, None, None] - (6.0 * torch.cos(swing))[:, None, None]
        hidden = self.hair.hangs
        # On the side that the head turns away from the viewer the face hides it.
        seen = (1.0 + side * self.column["yaw"] * -0.09).clamp(0.0, 1.0)
        if hidden:
            seen = seen * (side * self.column["swing"] * 2.6 - 0.35).clamp(0.0, 1.0)
        seen = seen[:, None, None]
        drop = _circle(u, v, 3.4)
        canvas.paint(canvas.coverage(drop).mul_(seen), scaled(identity.earring, 0.8))
        canvas.paint(canvas.coverage(_circle(u + 0.9, v + 0.9, 1.7)).mul_(seen), mix(identity.earring, WHITE, 0.5))

    def _whiskers(self) -> None:
        x, y = self.view.plane(self.identity.face_width * 0.9)
        x = x.abs()
        y = y - self.identity.mouth_y + 4.0
        for number, slope in enumerate((-0.22, -0.02, 0.18)):
            line = (y - slope * (x - 12.0) - 2.0 * (number - 1)).abs() - 0.42
            line = torch.maximum(line, (x - 25.0).abs() - 14.0)
            self.canvas.paint(self.canvas.coverage(line).mul_(0.85), (0.97, 0.96, 0.94))

    def _glasses(self) -> None:
        identity = self.identity
        depth = identity.face_width * 0.96
        x, y = self.view.plane(depth)
        side, mirrored = torch.sign(x), x.abs()
        eye_x, eye_y = mirrored - identity.eye_spacing - 0.3, y - identity.eye_y - 1.0
        if identity.glasses == "round":
            lens = _circle(eye_x, eye_y, 13.2)
        else:
            qx, qy = eye_x.abs() - 8.4, eye_y.abs() - 6.6
            lens = torch.sqrt(qx.clamp(min=0.0).square_().add_(qy.clamp(min=0.0).square_())).sub_(4.6)
            lens = lens.add_(torch.maximum(qx, qy).clamp_(max=0.0))
        canvas, colour = self.canvas, identity.glasses_colour
        canvas.paint(canvas.coverage(lens).mul_(0.08), WHITE)
        sheen = (eye_x * side + eye_y + 3.0).abs() - 1.6
        canvas.paint(canvas.coverage(torch.maximum(sheen, lens + 1.5)).mul_(0.20), WHITE)
        ring = lens.abs().sub_(1.15)
        bridge = torch.maximum((y - identity.eye_y + 1.5 + 0.02 * x.square()).abs() - 1.0, mirrored - 4.6)
        canvas.paint(canvas.coverage(torch.minimum(ring, bridge)), colour)
        # The temple that is seen when the head turns.
        for s in (-1.0, 1.0):
            ends = torch.tensor(
                [
                    [s * (identity.eye_spacing + 13.0), identity.eye_y, depth],
                    [s * (identity.face_width + 1.0), 1.0, 0.0],
                ]
            )
            (ax, ay, _), (bx, by, _) = (
                (torch.einsum("fij,j->fi", self.view.rotation, end) + self.view.shift)[:, :, None, None].unbind(1)
                for end in ends
            )
            dx, dy = bx - ax, by - ay
            along = ((self.view.x - ax) * dx + (self.view.y - ay) * dy) / (dx * dx + dy * dy).clamp_(min=1e-3)
            along = along.clamp_(0.0, 1.0)
            line = torch.sqrt((self.view.x - ax - along * dx).square_() + (self.view.y - ay - along * dy).square_())
            turned = (-s * self.column["yaw"] / 6.0).clamp(0.0, 1.0)[:, None, None]
            canvas.paint(canvas.coverage(line - 0.9).mul_(turned), colour)


def _wavy(distance: Tensor, x: Tensor, y: Tensor, scallops: int, bump: float) -> Tensor:
    """Raise bumps (bump > 0) or spikes (bump < 0, on the upper half only) on a round shape."""
    wave = torch.atan2(x, -y).mul_(0.5 * scallops).sin_().abs_()
    if bump < 0.0:
        return distance - (1.0 - wave).mul_((0.6 - y / 30.0).clamp_(0.0, 1.0)).mul_(-bump)
    return distance - wave.mul_(bump)


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _about_y(angle: Tensor) -> Tensor:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _matrix([[c, zero, s], [zero, one, zero], [-s, zero, c]])


def _about_x(angle: Tensor) -> Tensor:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _matrix([[one, zero, zero], [zero, c, -s], [zero, s, c]])


def _about_z(angle: Tensor) -> Tensor:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _matrix([[c, -s, zero], [s, c, zero], [zero, zero, one]])


@torch.no_grad()
def render(identity: Identity, motion: Tensor, size: int = 256) -> Tensor:
    """Draw somebody at every row of a motion track.

    Args:
        motion: [F, 14] float, columns as in `MOTION`; values outside `LIMITS` are clamped to them.
        size: height and width in pixels, at least 64.

    Returns:
        uint8 [F, 3, size, size].

    Raises:
        ValueError: `motion` is not [F, 14] or not finite, or `size` is below 64.
    """
    if motion.ndim != 2 or motion.shape[1] != len(MOTION):
        raise ValueError(f"motion must be [F, {len(MOTION)}], received {list(motion.shape)}")
    if not bool(torch.isfinite(motion).all()):
        raise ValueError("motion must be finite, received NaN or infinity")
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, received {size}")
    low, high = torch.tensor([LIMITS[name] for name in MOTION]).T
    motion = motion.to(torch.float32).cpu().clamp(low, high)
    chunk = max(1, round(4 * (DESIGN / size) ** 2))  # intermediates of a chunk stay in the processor's cache
    frames = torch.empty(len(motion), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(motion), chunk):
        drawn = _Drawing(identity, motion[start : start + chunk], size).draw()
        frames[start : start + chunk] = drawn.mul_(255.0).add_(0.5).clamp_(0.0, 255.0).to(torch.uint8)
    return frames
