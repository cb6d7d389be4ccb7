"""Emotions of a voice over time: detection, editing, a picture."""

from __future__ import annotations

EMOTIONS = ("angry", "disgusted", "fearful", "happy", "neutral", "other", "sad", "surprised", "unknown")
