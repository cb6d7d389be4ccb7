"""Features of recordings from the frozen emotion2vec, computed once per file and kept."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from memo_core.checkpoint.digest import weights_digest
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.errors import AudioError
from memo_core.inputs.recording import Recording
from memo_core.release import SAMPLE_RATE

from .readers import Clip, Rejected

WINDOW_SECONDS = 3  # what the detector judges a second by
LONG_SECONDS = 60  # a longer recording is judged in segments
SEGMENT_SECONDS = 30  # as MEMO's appendix A.1 divides long recordings
_BATCH = 16  # windows encoded at once
_CHUNK = 16  # files between two saves, all of them in memory: songs take 4 MB a minute


def encoder_digest(encoder: Emotion2Vec) -> str:
    """Tells encoders apart by weights and configuration."""
    text = weights_digest(encoder.state_dict()) + json.dumps(encoder.config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_windows(path: str | Path, min_samples: int = 400) -> list[Tensor]:
    """A recording cut into windows as the detector hears them: [T] float32 at 16 kHz, mono, at most 3 s each.

    Windows follow one another; the last one ends with the recording and reaches back into the one before it, so that
    all of them are 3 s long where the recording is.

    Raises AudioError for what is no file (a pipe would wait for ever), cannot be read, holds fewer than `min_samples`
    samples at 16 kHz, lasts longer than `memo_core.inputs.recording.MAX_SECONDS`, or is nothing but silence.
    """
    samples = Recording(path).mono(SAMPLE_RATE)
    if len(samples) < min_samples:
        raise AudioError(f"it lasts {len(samples)} samples at 16 kHz; at least {min_samples} make a feature")
    if samples.std() < 1e-6:
        raise AudioError("it is silent")
    length = min(WINDOW_SECONDS * SAMPLE_RATE, len(samples))
    starts = [*range(0, len(samples) - length, length), len(samples) - length]
    return [samples[start : start + length] for start in starts]


def segments(windows: Tensor) -> list[Tensor]:
    """One recording's windows [N, C] as they are, or if it lasts longer than a minute, those of each 30 s of it."""
    if len(windows) * WINDOW_SECONDS <= LONG_SECONDS:
        return [windows]
    return list(windows.split(SEGMENT_SECONDS // WINDOW_SECONDS))


@torch.no_grad()
def encode(windows: Sequence[Tensor], encoder: Emotion2Vec) -> Tensor:
    """Windows [T] each -> [N, C] float32 on the CPU: layer-normalised, encoded, averaged over time."""
    weight = next(encoder.parameters())
    pooled = torch.empty(len(windows), encoder.feature_dim)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i]))  # equal lengths go together
    while order:
        length = len(windows[order[0]])
        batch = [i for i in order[:_BATCH] if len(windows[i]) == length]
        order = order[len(batch) :]
        stacked = F.layer_norm(torch.stack([windows[i] for i in batch]), (length,))
        pooled[batch] = encoder(stacked.to(weight.device, weight.dtype)).mean(dim=1).float().cpu()
    return pooled


class FeatureStore:
    """Features on disk (SQLite), keyed by encoder and file: path, size and time of change.

    A file is encoded once; a changed file or another encoder, anew. Can be stopped at any time.
    """

    def __init__(self, path: str | Path, encoder: str):
        self.path, self.encoder = Path(path), encoder
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(self.path)
        try:
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS features (encoder TEXT, path TEXT, size INTEGER, changed INTEGER, "
                "windows INTEGER, width INTEGER, data BLOB, PRIMARY KEY (encoder, path))"
            )
        except sqlite3.DatabaseError as error:
            raise AudioError(f"{path} is not a store of features ({error}); delete it to compute them anew") from error

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def get(self, path: str) -> Tensor | None:
        """[windows, C] float32, or None where the file, as it is now, has not been encoded."""
        try:
            size, changed = _stamp(path)
        except (OSError, ValueError):
            return None
        row = self._database.execute(
            "SELECT windows, width, data FROM features WHERE encoder = ? AND path = ? AND size = ? AND changed = ?",
            (self.encoder, _text(path), size, changed),
        ).fetchone()
        if row is None or len(row[2]) != 4 * row[0] * row[1]:
            return None
        return torch.from_numpy(np.frombuffer(row[2], "<f4").reshape(row[0], row[1]).copy())

    def fill(self, clips: Sequence[Clip], encoder: Emotion2Vec, workers: int = 2) -> list[Rejected]:
        """Encodes what is missing, with a progress bar; the rows that could not be."""
        missing = [clip for clip in clips if self.get(clip.path) is None]
        rejected: list[Rejected] = []
        with ThreadPoolExecutor(workers) as pool, tqdm(total=len(clips), initial=len(clips) - len(missing)) as bar:
            bar.set_description("emotion2vec")
            for chunk in _chunks(missing, _CHUNK):
                heard = list(pool.map(lambda clip: _try_windows(clip.path, encoder.min_samples), chunk))
                windows = [window for _, got in heard if isinstance(got, list) for window in got]
                features = iter(encode(windows, encoder).split([len(g) for _, g in heard if isinstance(g, list)]))
                for clip, (stamp, got) in zip(chunk, heard):
                    if isinstance(got, str):
                        rejected.append(Rejected(clip.path, clip.dataset, got))
                    elif (values := next(features)).isfinite().all():
                        self._put(clip.path, stamp, values)
                    else:
                        rejected.append(Rejected(clip.path, clip.dataset, "its features are not finite"))
                self._database.commit()
                bar.update(len(chunk))
        return rejected

    def _put(self, path: str, stamp: tuple[int, int], values: Tensor) -> None:
        data = values.contiguous().numpy().astype("<f4").tobytes()
        self._database.execute(
            "INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self.encoder, _text(path), *stamp, *values.shape, data),
        )


def _try_windows(path: str, min_samples: int) -> tuple[tuple[int, int], list[Tensor] | str]:
    """Size and time of change of a file, and its windows or why there are none."""
    stamp = (0, 0)
    try:
        stamp = _stamp(path)
        return stamp, load_windows(path, min_samples)
    except Exception as error:  # whatever a broken file makes a decoder raise costs this row, not the run
        return stamp, str(error) or type(error).__name__


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _text(path: str) -> str:
    """A path that is not UTF-8 is no text for SQLite."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _chunks(items: Sequence[Clip], size: int) -> Iterator[Sequence[Clip]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
