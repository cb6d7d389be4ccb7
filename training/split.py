"""Which clips a run trains on, and which it keeps for validation: by video, and by who is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection

import numpy as np

from .shards import Shards

# Cosine of two face embeddings from which on they count as one person's. Ours: rather too many alike than one person on
# both sides.
SAME_FACE = 0.4
TRAINED, HELD_OUT, NEITHER = "trained", "held out", "neither"


def split(shards: Shards, share: float, learned: Collection[str] = ()) -> tuple[list[int], list[int]]:
    """Numbers of the samples to train on, and of those held out.

    A hash of its video's name says where a clip goes: to the held-out side for about `share` of the videos. But a clip
    follows those before it, in the order of the shards, that are of its video or show its face; where these are on both
    sides it is used on neither, so that no face and no video is on both. So the first clip of a person says
    where all go: the share is one of people where faces are known. Where that holds out nobody, the group of the least
    hash is held out, if there are two.

    Clips that are added come later in that order, and never move one from the trained side to the held-out one. They
    move one the other way only where the share held out nobody, and then only if they bring a group of a lesser hash.
    What was removed no longer draws others to its side: `learned` keeps them there.

    Args:
        shards: of which only the face embeddings are read, where there are any and something is held out.
        share: of the videos or people, 0 to 1.
        learned: keys of what the run has trained on before. These clips stay on the trained side, others follow them.
    """
    if share <= 0:
        return list(range(len(shards))), []
    known = [sample.key in learned for sample in shards.samples]
    order = np.argsort(np.logical_not(known), kind="stable")  # what was learned from comes before all that follows it
    begun = sum(known)
    names, faces = shards.videos(), _faces(shards)[order]
    videos = [names[number] for number in order]
    sides = _sides(videos, faces, begun, lambda video: _hash(video) < share)
    if HELD_OUT not in sides and (least := _least(videos, faces, begun)) is not None:
        sides = _sides(videos, faces, begun, lambda video: video == least)
        if TRAINED not in sides:
            sides[:] = TRAINED
    trained, held_out = (sorted(order[sides == side].tolist()) for side in (TRAINED, HELD_OUT))
    return trained, held_out


def _sides(videos: list[str], faces: np.ndarray, begun: int, chosen: Callable[[str], bool]) -> np.ndarray:
    """The side of each clip; the first `begun` are trained on, of the videos chosen those are held out that are free to
    be.
    """
    sides, of_video = np.full(len(videos), NEITHER, dtype=object), {}
    kept = np.empty_like(faces)  # the held-out clips' faces, so far
    count = 0
    for number, video in enumerate(videos):
        found = {of_video[video]} if video in of_video else set()
        if count and (kept[:count] @ faces[number]).max() > SAME_FACE:
            found.add(HELD_OUT)
        if number >= begun and (found == {HELD_OUT} or (not found and chosen(video))):
            # Few come here: they alone are compared with all before them.
            trained = bool(((faces[:number] @ faces[number] > SAME_FACE) & (sides[:number] == TRAINED)).any())
            side = (NEITHER if found else TRAINED) if trained else HELD_OUT
        else:
            side = NEITHER if len(found) == 2 else TRAINED
        sides[number] = side
        if side != NEITHER:
            of_video.setdefault(video, side)
        if side == HELD_OUT:
            kept[count], count = faces[number], count + 1
    return sides


def _least(videos: list[str], faces: np.ndarray, begun: int) -> str | None:
    """The video of least hash that begins a group: the clips before its first one are neither of it nor show its face,
    and none of the first `begun` are. None where there is none.
    """
    first: dict[str, int] = {}
    for number, video in enumerate(videos):
        first.setdefault(video, number)
    for video in sorted(first, key=_hash):
        number = first[video]
        if number >= begun and not (faces[:number] @ faces[number] > SAME_FACE).any():
            return video
    return None


def stable_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little") / 2**48


def _hash(video: str) -> float:
    return stable_hash(f"held out {video}")


def _faces(shards: Shards) -> np.ndarray:
    """Face embeddings of unit length [N, 512], of samples without one zero, which is like nobody; [N, 1] of zeros where
    no sample has one.
    """
    named = [number for number in range(len(shards)) if "face_embedding" in shards.names(number)]
    if not named:
        return np.zeros((len(shards), 1), np.float32)
    width = shards.names(named[0])["face_embedding"][0]
    faces = np.zeros((len(shards), width), np.float32)
    for number in named:
        face = shards.read(number, "face_embedding").float().numpy()
        length = float(np.linalg.norm(face))
        if face.shape == (width,) and 0 < length < np.inf:
            faces[number] = face / length
    return faces
