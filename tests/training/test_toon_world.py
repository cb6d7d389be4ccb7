"""The second toon world: heads drawn from a motion track, what a portrait hides, and how they act."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from training.toon.world import acting, drawing, identity

INDEX = {name: i for i, name in enumerate(drawing.MOTION)}


def somebody(seed: int = 3, **changes: object) -> identity.Identity:
    plain = {
        "kind": "human",
        "cheek": "none",
        "earring": None,
        "mouth": "plain",
        "wall_picture": 0.0,
        "eyes_shut": False,
    }
    return replace(identity.sample_identity(np.random.default_rng(seed)), **(plain | changes))


def pose(**values: float) -> Tensor:
    motion = drawing.neutral_motion()
    for name, value in values.items():
        motion[INDEX[name]] = value
    return motion


def pictures(who: identity.Identity, *poses: Tensor, size: int = 128) -> Tensor:
    return drawing.render(who, torch.stack(poses), size).int()


@pytest.mark.parametrize("kind", identity.KINDS)
def test_equal_seeds_draw_equal_pictures_whatever_is_drawn_with_them(kind: str) -> None:
    who = somebody(kind=kind, hair_style="bald" if kind != "human" else "long")
    together = pictures(who, pose(), pose(yaw=20), pose(mouth_open=0.8))
    assert torch.equal(together[1:2], pictures(who, pose(yaw=20)))
    assert torch.equal(together, pictures(who, pose(), pose(yaw=20), pose(mouth_open=0.8)))


@pytest.mark.parametrize("name", drawing.MOTION)
def test_every_parameter_is_seen(name: str) -> None:
    who = somebody(hair_style="long", earring=(0.98, 0.82, 0.30))
    low, high = drawing.LIMITS[name]
    before, after = pictures(who, pose(**{name: low, "lids": low if name == "lids" else 0.8}), pose(**{name: high}))
    assert ((before - after).abs().amax(dim=0) > 24).float().mean() > 0.002


def test_values_beyond_their_limits_are_drawn_as_the_limits() -> None:
    limits = torch.tensor([drawing.LIMITS[name][1] for name in drawing.MOTION])
    assert torch.equal(pictures(somebody(), limits * 3), pictures(somebody(), limits))


def test_a_head_turns_about_its_own_axis_and_shifts_by_its_units() -> None:
    who = somebody(hair_style="bald", glasses="none")
    still, turned, shifted = pictures(who, pose(), pose(yaw=25), pose(shift_x=8)).float()
    moved = torch.roll(still, 8, dims=2)
    # Where the head is, the shifted picture is the still one, eight units on; a turn moves the features further than
    # the outline.
    face = (slice(None), slice(40, 90), slice(50, 90))
    assert (shifted[face] - moved[face]).abs().mean() < 3
    assert (turned[face] - still[face]).abs().mean() > 10


@pytest.mark.parametrize(
    ("changes", "hidden", "shown"),
    [
        ({"cheek": "star", "cheek_side": 1.0}, {}, {"yaw": -28}),
        ({"cheek": "plaster", "cheek_side": -1.0}, {}, {"yaw": 28}),
        ({"earring": (0.98, 0.82, 0.30), "hair_style": "long"}, {}, {"swing": 0.9}),
        ({"mouth": "gold"}, {}, {"mouth_open": 0.9}),
        ({"mouth": "blue tongue"}, {}, {"mouth_open": 0.9}),
    ],
    ids=["star", "plaster", "earring", "tooth", "tongue"],
)
def test_what_a_portrait_hides_a_video_shows(changes: dict, hidden: dict, shown: dict) -> None:
    plain, secret = somebody(hair_style="bald"), somebody(**({"hair_style": "bald"} | changes))
    plain = replace(plain, hair_style=secret.hair_style)
    different = (pictures(plain, pose(**hidden), pose(**shown)) - pictures(secret, pose(**hidden), pose(**shown))).abs()
    in_portrait, in_video = (part.amax(dim=0).gt(24).sum() for part in different)
    assert in_video > 12 and in_video > 3 * in_portrait


def test_shares_of_secrets_are_as_stated() -> None:
    rng = np.random.default_rng(1)
    people = [identity.sample_identity(rng) for _ in range(1500)]
    for name, has in (
        ("cheek", lambda who: who.cheek != "none"),
        ("mouth", lambda who: who.mouth != "plain"),
        ("wall", lambda who: who.wall_picture != 0.0),
        ("closed eyes", lambda who: who.eyes_shut),
    ):
        assert np.mean([has(who) for who in people]) == pytest.approx(identity.SECRETS[name], abs=0.05)
    assert np.mean([who.kind == "human" for who in people]) == pytest.approx(0.88, abs=0.03)


class Spoken:
    def __init__(self, seconds: float = 6.0) -> None:
        frames = round(seconds * acting.FPS)
        self.mouth_open = np.abs(np.sin(np.arange(frames) * 0.4))
        self.mouth_width = np.sin(np.arange(frames) * 0.2)


@pytest.mark.parametrize("emotion", range(8))
def test_an_emotion_sets_its_signature_and_the_mouth_is_the_utterances(emotion: int) -> None:
    spoken = Spoken()
    motion = acting.perform(spoken, emotion, np.random.default_rng(emotion))
    assert torch.allclose(motion[:, INDEX["mouth_open"]], torch.from_numpy(spoken.mouth_open).float())
    for name, value in zip(acting.SIGNATURE[:3], acting.SIGNATURES[emotion]):
        assert float(motion[:, INDEX[name]].mean()) == pytest.approx(value, abs=0.25)
    for name, (low, high) in drawing.LIMITS.items():
        assert low <= motion[:, INDEX[name]].min() and motion[:, INDEX[name]].max() <= high


def test_heads_move_by_themselves_and_differently_in_every_clip() -> None:
    """The voice hardly tells how: the same one, twenty clips."""
    turns = [acting.perform(Spoken(), 4, np.random.default_rng(seed))[:, INDEX["yaw"]] for seed in range(20)]
    spread = torch.stack([turn.std() for turn in turns])
    assert spread.median() > 2 and spread.max() > 2 * spread.min()
    correlations = np.corrcoef(torch.stack(turns).numpy())[np.triu_indices(20, 1)]
    assert np.abs(correlations).mean() < 0.5


def test_hair_swings_after_a_head_that_has_stopped() -> None:
    frames = 90
    track = {name: np.zeros(frames) for name in ("yaw", "pitch", "roll", "shift_x", "shift_y")}
    track["yaw"][30:36] = np.linspace(0, 25, 6)
    track["yaw"][36:] = 25
    swing = acting.swing(track)
    assert np.abs(swing[:29]).max() < 0.02
    assert np.abs(swing[37:50]).max() > 0.2 and np.abs(swing[-5:]).max() < 0.1
