"""`memo emotion`: the emotions heard in a voice."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .arguments import add_checkpoint
from .output import OK, check_picture, named_after, save_picture


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """What the command takes."""
    sub.add_argument("voice", metavar="VOICE", help="any file with sound")
    sub.add_argument("-o", "--output", metavar="PNG", help="the picture (default: VOICE.emotion.png, here)")
    add_checkpoint(sub)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    output = Path(args.output or named_after(args.voice, ".emotion.png"))
    kind = check_picture(output, args.voice)

    from ..checkpoint.layout import EMOTION_HEAD, find
    from ..checkpoint.settings import read_net_config
    from ..encoders.emotion2vec import Emotion2Vec
    from ..encoders.emotion_head import EmotionHead
    from ..inputs.emotion import detect_emotion
    from ..inputs.recording import Recording
    from ..inputs.speech import count_frames
    from ..judging.drawings.emotion import draw_emotion
    from ..release import EMOTIONS, SAMPLE_RATE

    folder = find(args.checkpoint)
    config = read_net_config(folder / "diffusion_net")
    recording = Recording(args.voice)
    waveform, seconds = recording.mono(SAMPLE_RATE), recording.seconds
    encoder = Emotion2Vec.from_pretrained(folder / "emotion2vec")
    head = EmotionHead.from_pretrained(folder / EMOTION_HEAD)
    frames = count_frames(recording.num_samples, recording.sample_rate, config.fps)
    frames = config.window * math.ceil(frames / config.window)
    track = detect_emotion(waveform, SAMPLE_RATE, encoder, head, frames, config.fps)

    labels = track.probabilities.argmax(dim=1).tolist()
    times = [*track.segment_starts.tolist(), seconds]
    changes = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]] + [len(labels)]
    print(f"{'from':>9} {'to':>9}  {'emotion':<10} probability")
    for first, last in zip(changes, changes[1:]):
        mean = float(track.probabilities[first:last, labels[first]].mean())
        print(f"{times[first]:7.2f} s {times[last]:7.2f} s  {EMOTIONS[labels[first]]:<10} {mean:11.2f}")
    save_picture(draw_emotion(track, waveform, SAMPLE_RATE), output, kind)
    return OK
