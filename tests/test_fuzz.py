"""Readers of what comes from strangers, given 500 kinds of damage each: their own errors, and soon."""

from __future__ import annotations

import random

from fuzzing import assert_no_foreign, damaged

from memo_core.emotion import EmotionTrack
from memo_core.errors import EmotionError

RUNS = 500


def test_emotion_lines() -> None:
    track = EmotionTrack.constant("neutral", 90)
    words = ("1e400", "nan", "inf", "9" * 400, "-1", "\u00b2", "end", "angry", "0:59.5", "\udcff", "\r", "1.5-2.5")
    edited = 0
    for seed in range(RUNS):
        rng = random.Random(seed)
        text = "0.0-1.5 happy 0.25\n1.5-2.5 angry\n# a remark\n0:02.5-end sad 0.7\n"
        if rng.random() < 0.5:
            text = damaged(text.encode(), rng).decode("utf-8", "replace")
        else:
            parts = text.split(" ")
            parts[rng.randrange(len(parts))] = rng.choice(words)
            text = " ".join(parts)
        edited += assert_no_foreign(lambda: track.edited(text), EmotionError)
    assert 0 < edited < RUNS
