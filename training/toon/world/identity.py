"""Who somebody is: colours, proportions, hair, clothes, wall and light, drawn at random from one generator.

Lengths are in design units: a picture is 128 of them wide and high. In the head's own coordinates x is to the viewer's
right, y down and z towards the viewer, from the centre of the head, when it looks straight ahead.

What a portrait hides and a video shows again and again (`SECRETS`) is drawn for a stated share of the identities.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, fields

import numpy as np

Colour = tuple[float, float, float]

KINDS = ("human", "cat", "robot")
KIND_SHARES = (0.88, 0.06, 0.06)

SECRETS = {
    "cheek": 0.35,  # a mark or a plaster on one cheek, so far to the side that only a turned head shows it
    "earring": 0.40,  # where hair hangs over the ears it shows when the hair swings
    "closed eyes": 0.10,  # the portrait's eyes are shut
    "mouth": 0.30,  # a gap, a golden tooth or a coloured tongue
    "wall": 0.35,  # a picture on the wall, half behind the head
}
"""Share of the identities that have each of them."""


@dataclass(frozen=True, kw_only=True)
class Hair:
    """A haircut: a shell around the skull, minus a window for the face, plus what hangs or sits behind the head."""

    volume: float = 4.0  # how far the shell stands out from the skull
    scallops: int = 0  # bumps around it
    bump: float = 0.0  # their height; negative makes spikes
    window_x: float = 0.0  # centre of the window (times the parting's side)
    window_y: float = 14.0
    window_width: float = -3.0  # half width, relative to the face's
    window_height: float = 40.0
    window_square: bool = False
    shear: float = 0.0  # slope of the hairline towards the parting's side
    zigzag: float = 0.0  # teeth of the hairline
    cut: float = 4.0  # the shell ends here
    back_width: float = 0.0  # half width behind the head, relative to the face's; 0 for none
    back_bottom: float = 0.0
    # x relative to the face's half width (mirrored, unless 0: in the middle), y, radius
    buns: tuple[tuple[float, float, float], ...] = ()
    tint: float = 1.0  # 1 full hair colour; less lets the skin shine through

    @property
    def hangs(self) -> bool:
        """Whether it covers the ears."""
        return self.cut > 20.0


HAIR = {
    "bald": Hair(volume=-6.0),
    "crop": Hair(window_height=38.0, zigzag=1.5),
    "parted": Hair(volume=5.0, window_x=5.0, window_y=16.0, window_width=-3.0, window_height=43.0, shear=0.28, cut=6.0),
    "buzz": Hair(volume=1.5, window_height=37.0, window_width=-2.0, cut=0.0, tint=0.72),
    "spiky": Hair(volume=4.0, scallops=11, bump=-7.0, window_height=37.0, zigzag=4.0, cut=0.0),
    "curly": Hair(volume=5.0, scallops=15, bump=4.0, window_height=36.0, window_width=-3.5, cut=14.0),
    "afro": Hair(volume=4.0, scallops=17, bump=3.0, window_height=36.0, window_width=-5.0, cut=8.0, back_width=11.0,
                 back_bottom=16.0),
    "quiff": Hair(volume=6.5, window_x=-4.0, window_y=18.0, window_width=-3.0, window_height=44.0, shear=-0.2,
                  zigzag=1.0, cut=2.0),
    "bob": Hair(volume=5.0, window_y=20.0, window_width=-3.5, window_height=41.0, window_square=True, zigzag=1.2,
                cut=36.0, back_width=5.0, back_bottom=38.0),
    "long": Hair(volume=4.5, window_y=16.0, window_width=-3.5, window_height=45.0, cut=40.0, back_width=9.0,
                 back_bottom=90.0),
    "swept": Hair(volume=5.5, window_x=5.0, window_y=18.0, window_width=-2.0, window_height=46.0, shear=0.3, cut=34.0,
                  back_width=7.0, back_bottom=90.0),
    "waves": Hair(volume=5.5, scallops=13, bump=2.0, window_y=17.0, window_width=-2.5, window_height=44.0, cut=38.0,
                  back_width=10.0, back_bottom=70.0),
    "bun": Hair(volume=3.0, window_height=39.0, window_width=-3.0, cut=2.0, buns=((0.0, -46.0, 10.5),)),
    "space buns": Hair(volume=4.0, window_y=18.0, window_width=-4.0, window_height=40.0, window_square=True, zigzag=1.5,
                       cut=10.0, buns=((-4.0, -36.0, 12.5),)),
    "pigtails": Hair(volume=3.5, window_y=15.0, window_width=-4.0, window_height=42.0, cut=8.0,
                     buns=((11.0, 8.0, 12.0), (12.0, 24.0, 9.5))),
}  # fmt: skip
"""Haircuts by name."""

CLOTHES = ("crew", "v-neck", "stripes", "collar", "hood", "turtleneck")
WALLS = ("plain", "dots", "stripes", "waves", "checks", "rays", "lights")
BEARDS = ("none", "stubble", "full", "goatee", "moustache")
BEARD_SHARES = (0.70, 0.08, 0.09, 0.06, 0.07)
GLASSES = ("none", "round", "square")
GLASSES_SHARES = (0.76, 0.13, 0.11)
MOUTHS = ("plain", "gap", "gold", "blue tongue")
CHEEKS = ("none", "mole", "plaster", "star")

SKINS: tuple[Colour, ...] = (
    (1.00, 0.87, 0.77), (0.98, 0.80, 0.67), (0.95, 0.75, 0.58), (0.88, 0.66, 0.47),
    (0.78, 0.55, 0.38), (0.68, 0.46, 0.32), (0.57, 0.38, 0.27), (0.47, 0.31, 0.24),
)  # fmt: skip
HAIRS: tuple[Colour, ...] = (
    (0.15, 0.12, 0.14), (0.27, 0.17, 0.12), (0.42, 0.26, 0.15), (0.60, 0.37, 0.18), (0.75, 0.32, 0.14),
    (0.93, 0.76, 0.38), (0.84, 0.83, 0.84), (0.93, 0.45, 0.60), (0.20, 0.55, 0.62), (0.45, 0.33, 0.68),
    (0.22, 0.35, 0.66),
)  # fmt: skip
IRISES: tuple[Colour, ...] = (
    (0.38, 0.23, 0.12), (0.56, 0.36, 0.14), (0.20, 0.48, 0.76), (0.22, 0.56, 0.36), (0.42, 0.48, 0.57),
    (0.16, 0.58, 0.62),
)  # fmt: skip
FURS: tuple[Colour, ...] = ((0.93, 0.62, 0.30), (0.55, 0.55, 0.60), (0.25, 0.24, 0.28), (0.95, 0.91, 0.84))
METALS: tuple[Colour, ...] = ((0.70, 0.78, 0.84), (0.55, 0.80, 0.78), (0.92, 0.80, 0.50), (0.84, 0.62, 0.60))
GEMS: tuple[Colour, ...] = ((0.98, 0.82, 0.30), (0.85, 0.90, 0.95), (0.90, 0.25, 0.35), (0.20, 0.75, 0.65))


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What stays the same about somebody. Colours are RGB in [0, 1], lengths in design units."""

    kind: str  # of KINDS
    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    clothes: Colour
    trim: Colour
    wall_top: Colour
    wall_bottom: Colour
    wall_pattern: str  # of WALLS
    wall_picture: float  # where a picture hangs, half behind the head: x of its middle; 0 for none
    wall_picture_colour: Colour
    light_x: float  # from where the light comes, in [-1, 1]: 1 from the viewer's right
    light_y: float  # -1 from above
    light: float  # how much darker the far side is, in [0, 1]
    rim: Colour  # of the light from behind
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
    nose_length: float
    nose_y: float
    mouth_width: float  # half width at rest
    mouth_y: float
    lip_thickness: float
    blush: float
    freckles: float
    age: float  # 0 young to 1 old: lines of forehead and cheeks
    hair_style: str
    parting: float  # -1 or 1: side of the parting
    clothes_style: str
    beard: str  # of BEARDS
    glasses: str  # of GLASSES
    glasses_colour: Colour
    cheek: str  # of CHEEKS, far to the side
    cheek_side: float  # -1 or 1
    earring: Colour | None
    mouth: str  # of MOUTHS: what a closed one hides
    eyes_shut: bool  # in the portrait

    def __hash__(self) -> int:  # as caches ask: of what tells two apart
        return hash((self.skin, self.clothes, self.face_width, self.eye_y, self.hair_style))


def hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)


def mix(a: Colour, b: Colour, weight: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * weight, a[1] + (b[1] - a[1]) * weight, a[2] + (b[2] - a[2]) * weight)


def scaled(colour: Colour, factor: float) -> Colour:
    return (min(1.0, colour[0] * factor), min(1.0, colour[1] * factor), min(1.0, colour[2] * factor))


def sample_identity(rng: np.random.Generator) -> Identity:
    """Somebody at random; the same state of `rng` gives the same one."""

    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def one_of(things: tuple, shares: tuple[float, ...] | None = None):
        return things[int(rng.choice(len(things), p=shares))]

    def secret(name: str) -> bool:
        return bool(rng.random() < SECRETS[name])

    kind = one_of(KINDS, KIND_SHARES)
    position = uniform(0.0, len(SKINS) - 1.001)
    skin = mix(SKINS[int(position)], SKINS[int(position) + 1], position % 1.0)
    age = max(0.0, uniform(-0.6, 1.0))
    hair = mix(scaled(one_of(HAIRS), uniform(0.88, 1.1)), HAIRS[6], 0.8 * max(0.0, age - 0.5) / 0.5)
    style = one_of(tuple(name for name in HAIR if name != "bald" or age > 0.2))
    beard = one_of(BEARDS, BEARD_SHARES)
    if kind == "cat":
        skin, style, beard = one_of(FURS), "bald", "none"
        hair = scaled(skin, 0.45)
    elif kind == "robot":
        skin, style, beard = one_of(METALS), "bald", "none"
        hair = scaled(skin, 0.4)
    # A wall's hue, clothes that go with it: opposite or next to it, as posters have them.
    hue = uniform(0.0, 1.0)
    muted = uniform(0.18, 0.5)
    wall_top = hsv(hue, muted, uniform(0.80, 0.95))
    wall_bottom = hsv(hue + uniform(-0.07, 0.07), muted + uniform(0.05, 0.2), uniform(0.6, 0.85))
    clothes_hue = hue + one_of((0.5, 0.42, 0.58, 0.33, 0.67)) + uniform(-0.04, 0.04)
    clothes = hsv(clothes_hue, uniform(0.45, 0.8), uniform(0.35, 0.85))
    trim = (0.97, 0.95, 0.92) if rng.random() < 0.5 else hsv(clothes_hue + uniform(0.4, 0.6), 0.55, 0.88)
    eye_height = uniform(9.0, 11.4)
    eye_y = uniform(-5.0, -2.5)
    lips = mix(scaled(skin, 0.80), (0.83, 0.27, 0.33), uniform(0.35, 0.8))
    return Identity(
        kind=kind,
        skin=skin,
        hair=hair,
        iris=one_of(IRISES) if kind != "cat" else one_of(((0.80, 0.72, 0.20), (0.45, 0.72, 0.30), (0.35, 0.70, 0.80))),
        lips=lips if kind == "human" else mix(scaled(skin, 0.7), (0.6, 0.3, 0.35), 0.4),
        clothes=clothes,
        trim=trim,
        wall_top=wall_top,
        wall_bottom=wall_bottom,
        wall_pattern=one_of(WALLS),
        wall_picture=uniform(36.0, 44.0) * one_of((-1.0, 1.0)) if secret("wall") else 0.0,
        wall_picture_colour=hsv(hue + uniform(0.25, 0.75), 0.55, 0.85),
        light_x=uniform(0.35, 0.8) * one_of((-1.0, 1.0)),
        light_y=uniform(-0.8, -0.35),
        light=uniform(0.35, 0.75),
        rim=mix((1.0, 0.95, 0.85), wall_top, uniform(0.2, 0.8)),
        face_width=uniform(33.0, 38.0),
        cranium=uniform(40.0, 43.5),
        chin=uniform(43.0, 47.0),
        taper=uniform(0.05, 0.24),
        ear=uniform(0.85, 1.2),
        eye_width=uniform(8.4, 10.2),
        eye_height=eye_height,
        eye_spacing=uniform(15.8, 17.8),
        eye_y=eye_y,
        iris_radius=uniform(5.8, 6.9),
        brow_y=eye_y - eye_height - uniform(5.5, 7.5),
        brow_length=uniform(8.0, 10.0),
        brow_thickness=uniform(1.7, 3.0),
        nose_width=uniform(4.2, 6.4),
        nose_length=uniform(6.0, 9.5),
        nose_y=uniform(9.0, 11.5),
        mouth_width=uniform(14.5, 17.5),
        mouth_y=uniform(22.5, 24.5),
        lip_thickness=uniform(1.6, 2.7),
        blush=uniform(0.1, 0.5),
        freckles=uniform(0.3, 0.8) if rng.random() < 0.15 else 0.0,
        age=age,
        hair_style=style,
        parting=one_of((-1.0, 1.0)),
        clothes_style=one_of(CLOTHES),
        beard=beard,
        glasses=one_of(GLASSES, GLASSES_SHARES),
        glasses_colour=one_of(((0.14, 0.13, 0.16), (0.55, 0.32, 0.16), (0.75, 0.2, 0.25), (0.85, 0.72, 0.4))),
        cheek=one_of(CHEEKS[1:]) if secret("cheek") else "none",
        cheek_side=one_of((-1.0, 1.0)),
        earring=one_of(GEMS) if secret("earring") and kind == "human" else None,
        mouth=one_of(MOUTHS[1:]) if secret("mouth") else "plain",
        eyes_shut=secret("closed eyes"),
    )


def secrets(identity: Identity) -> list[str]:
    """Which of SECRETS somebody has."""
    has = {
        "cheek": identity.cheek != "none",
        "earring": identity.earring is not None and HAIR[identity.hair_style].hangs,
        "closed eyes": identity.eyes_shut,
        "mouth": identity.mouth != "plain",
        "wall": identity.wall_picture != 0.0,
    }
    return [name for name, there in has.items() if there]


COLOURS = tuple(field.name for field in fields(Identity) if field.type == "Colour")
"""Names of the attributes that are colours."""
