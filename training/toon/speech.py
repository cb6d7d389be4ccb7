"""Trains the toon checkpoint's small speech encoder (wav2vec 2.0) and emotion detector on toon voices.

The released encoders learned from thousands of hours without labels; small ones cannot, so here they learn with labels:
the speech encoder to tell how far and how wide the mouth is open, the emotion detector the eight emotions. The read-out
layer of the former is thrown away: what is kept are hidden states, as in the released model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memo_core.checkpoint.layout import EMOTION_HEAD
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.encoders.speech import SpeechEncoder

from .. import run
from . import sizes, voices

SPEECH_STEPS, EMOTION_STEPS = 700, 4000
BATCH = 12


def utterance(
    seconds: float, rng: np.random.Generator, real_share: float = 0.0, emotion: int | None = None
) -> voices.Utterance:
    """A random voice saying something; with probability `real_share` one of espeak-ng's, where it is installed (the
    emotion is then only a label: those voices have none).
    """
    if emotion is None:
        emotion = int(rng.integers(8))
    if real_share and rng.random() < real_share and voices.espeak_available():
        return voices.random_espeak(seconds, rng, emotion)
    return voices.speak(voices.sample_voice(rng), emotion, seconds, rng)


def waveforms(batch: list[voices.Utterance]) -> Tensor:
    """[B, T], each row of zero mean and unit variance."""
    return F.layer_norm(rows := torch.stack([torch.from_numpy(np.asarray(u.waveform)) for u in batch]), rows.shape[-1:])


def train_speech(folder: Path, steps: int = SPEECH_STEPS) -> Path:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    encoder = SpeechEncoder.from_config(
        {
            **sizes.SPEECH,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "feat_proj_dropout": 0.0,
        }
    )
    readout = nn.Linear(sizes.SPEECH_DIM, 2)
    parameters = [*encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    job = run.Job(
        folder / "speech_job",
        steps,
        {"encoder": encoder, "readout": readout},
        optimizer,
        generator,
        settings=str(sizes.SPEECH),
    )
    encoder.train()
    for step in job.steps():
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * run.warmup_cosine(step, steps, 60)
        rng = run.numpy_rng(generator)
        batch = [utterance(2.0, rng, real_share=0.25) for _ in range(BATCH)]
        wanted = torch.stack(
            [torch.stack([torch.as_tensor(u.mouth_open), torch.as_tensor(u.mouth_width)], -1) for u in batch]
        ).float()
        noisy = waveforms(batch)
        noisy = noisy + torch.rand(BATCH, 1, generator=generator) * 0.1 * torch.randn(noisy.shape, generator=generator)
        predicted = readout(encoder(noisy, wanted.shape[1])[:, :, -1])
        loss = F.mse_loss(predicted, wanted)
        run.descend(optimizer, loss)
        if step % 20 == 0:
            a, b = predicted[..., 0].detach().flatten(), wanted[..., 0].flatten()
            job.log(loss=loss.detach(), mouth_r=torch.corrcoef(torch.stack([a, b]))[0, 1])
    encoder.eval().save_pretrained(folder / "checkpoint" / "wav2vec2", dtype=torch.float16)
    return folder / "checkpoint" / "wav2vec2"


def train_emotion(folder: Path, steps: int = EMOTION_STEPS) -> Path:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    encoder = Emotion2Vec.from_config(sizes.EMOTION)
    head = EmotionHead(feature_dim=encoder.feature_dim, hidden_dim=64)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    job = run.Job(
        folder / "emotion_job",
        steps,
        {"encoder": encoder, "head": head},
        optimizer,
        generator,
        settings=str(sizes.EMOTION),
    )
    encoder.train()
    for step in job.steps():
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * run.warmup_cosine(step, steps, 60)
        rng = run.numpy_rng(generator)
        seconds = float(rng.choice([2.0, 3.0]))  # the detector's segments: 3 s, the first and last one 2 s
        batch = [utterance(seconds, rng) for _ in range(BATCH)]
        wanted = torch.tensor([u.emotion for u in batch])
        logits = head(encoder(waveforms(batch)).mean(dim=1))
        loss = F.cross_entropy(logits, wanted)
        run.descend(optimizer, loss)
        if step % 20 == 0:
            job.log(loss=loss.detach(), accuracy=(logits.argmax(-1) == wanted).float().mean())
    encoder.eval().save_pretrained(folder / "checkpoint" / "emotion2vec", dtype=torch.float16)
    head.save_pretrained(folder / "checkpoint" / EMOTION_HEAD, dtype=torch.float16)
    return folder / "checkpoint" / "emotion2vec"
