"""Checks a toon video against its voice: python tests/check_demo.py VIDEO VOICE

It has sound, lasts as long as the voice within one frame, says that it was made by AI, and its mouth moves with the
sound. The mouth is read from the frames by the judge, and compared with the one guessed from the sound alone.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from memo_core.inputs.sound import load_audio, prepare_waveform
from memo_core.video.read import read_video
from training.toon.heads import MOTION
from training.toon.judge import Judge, correlation_and_lag
from training.toon.voices import estimate_mouth

MIN_CORRELATION = 0.5  # 20 clips against the voice of another: 0.05 on average, 0.37 at most
MIN_MOTION = 0.05  # standard deviation of the mouth's opening, 0 closed and 1 wide open
MAX_LAG = 2  # frames


def main(video: str, voice: str) -> None:
    """Prints what was measured; AssertionError where it does not suffice."""
    about, frames = read_video(video)
    waveform, rate = load_audio(voice)
    seconds, tolerance = waveform.shape[1] / rate, 1 / about.fps
    assert about.audio_duration is not None, f"{video} has no sound"
    assert abs(about.duration - seconds) <= tolerance, f"{video} lasts {about.duration} s, {voice} {seconds} s"
    assert abs(about.audio_duration - seconds) <= tolerance, f"its sound lasts {about.audio_duration} s"
    assert "made by AI" in about.metadata["description"], f"{video} does not say that it was made by AI"

    heard = prepare_waveform(*load_audio(video))
    assert float(heard.abs().max()) > 0.05, f"the sound of {video} is silent"
    pictures = torch.from_numpy(np.stack(list(frames))).permute(0, 3, 1, 2)
    seen = Judge.load().read(pictures)[:, MOTION.index("mouth_open")]
    guessed = torch.from_numpy(estimate_mouth(prepare_waveform(waveform, rate).numpy())[0])
    common = min(len(seen), len(guessed))
    measured = correlation_and_lag(seen[:common], guessed[:common])
    print(
        f"{video}: {about.frames} frames, {about.duration:.2f} s with sound; mouth and voice correlate "
        f"{measured.correlation:.2f} (at best {measured.best:.2f}, {measured.lag} frames later)"
    )
    assert measured.correlation >= MIN_CORRELATION, f"{MIN_CORRELATION} is the least for a talking mouth"
    assert abs(measured.lag) <= MAX_LAG, f"a mouth may be {MAX_LAG} frames early or late"
    assert float(seen.std()) >= MIN_MOTION, f"the mouth moves by {float(seen.std()):.3f}, at least {MIN_MOTION} is seen"


if __name__ == "__main__":
    main(*sys.argv[1:])
