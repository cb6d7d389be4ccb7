"""Which clips a run trains on, and which it keeps for validation: by video, and by who is seen."""

from __future__ import annotations

import hashlib

import numpy as np

from .shards import Shards

# Cosine of two face embeddings from which on they count as one person's. Ours: rather too many alike than one person on
# both sides.
SAME_FACE = 0.4
TRAINED, HELD_OUT, NEITHER = "trained", "held out", "neither"


def split(shards: Shards, share: float) -> tuple[list[int], list[int]]:
    """Numbers of the samples to train on, and of those held out.

    A hash of its video's name says where a clip goes: to the held-out side for about `share` of the videos. But a clip
    follows those before it, in the order of the shards, that are of its video or show its face; where these are on both
    sides it is used on neither, so that no face and no video is on both. Clips that are added come later in that order:
    they never move those that were there. What removing clips does to the ones that followed them is not said.

    Args:
        shards: of which only the face embeddings are read, where there are any and something is held out.
        share: of the videos, 0 to 1.
    """
    if share <= 0:
        return list(range(len(shards))), []
    videos, faces = shards.videos(), _faces(shards)
    chosen = {video: _chosen(video, share) for video in set(videos)}
    sides, of_video = np.full(len(shards), NEITHER, dtype=object), {}
    kept = np.empty_like(faces)  # the held-out clips' faces, so far
    count = 0
    for number, video in enumerate(videos):
        found = {of_video[video]} if video in of_video else set()
        if count and (kept[:count] @ faces[number]).max() > SAME_FACE:
            found.add(HELD_OUT)
        if found == {HELD_OUT} or (not found and chosen[video]):
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
    trained, held_out = (np.flatnonzero(sides == side).tolist() for side in (TRAINED, HELD_OUT))
    return trained, held_out


def stable_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little") / 2**48


def _chosen(video: str, share: float) -> bool:
    return stable_hash(f"held out {video}") < share


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
