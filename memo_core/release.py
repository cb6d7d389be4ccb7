"""Numbers that the release fixes: what its checkpoints were trained with."""

from __future__ import annotations

WINDOW = 16  # frames denoised together
LONGEST_WINDOW = 64  # that a checkpoint may choose instead
FPS = 30  # frames a second
CROP_MARGIN = 0.35  # room around the portrait's face, in parts of its size, where a checkpoint says nothing
SAMPLE_RATE = 16000  # Hz, what the speech encoder and emotion2vec listen to
DECAY = 0.9  # gamma, by which the memory fades per frame
VAE_SCALE = 8  # pixels along a side of a latent
# In the order of the detector.
EMOTIONS = ("angry", "disgusted", "fearful", "happy", "neutral", "other", "sad", "surprised", "unknown")
NULL_EMOTION = 9  # the label of classifier-free guidance; 0 to 8 are the classes
EMOTION_LABELS = 10
