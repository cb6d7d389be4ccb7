"""Errors raised by memo_core. Each names the value received and what is allowed, ready to be shown as it is."""

from __future__ import annotations


class MemoError(ValueError):
    """Base of every error this package raises on purpose."""


class AudioError(MemoError):
    """A recording that cannot be used: empty, not finite, wrong shape, unreadable file."""


class EmotionError(MemoError):
    """An unknown emotion label, or a time span outside the track."""


class PortraitError(MemoError):
    """A portrait that cannot be used: wrong shape or range, no face where one was demanded."""


class CheckpointError(MemoError):
    """Missing files, missing, extra or misshapen weights, or a configuration that is not understood."""


class MemoryStateError(MemoError):
    """A memory state that is damaged, or was made by another model or from another reference."""


class SamplingError(MemoError):
    """Arguments of sampling that do not fit each other or the model."""


class VideoError(MemoError):
    """A video file that cannot be read or written."""


class DownloadError(MemoError):
    """Weights that could not be fetched, or whose checksum differs."""


class ComposeError(MemoError):
    """Frames, pictures or boxes that cannot be used, or do not fit each other."""
