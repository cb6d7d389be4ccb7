"""Trains the emotion head on frozen features: cross-entropy and a contrastive regulariser (MEMO appendix A)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memo_core.checkpoint.layout import EMOTION_HEAD
from memo_core.checks import shown
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.errors import EmotionError
from memo_core.files import replace_whole
from memo_core.release import EMOTIONS

from .. import run
from ..reading import fits, read_json
from .labels import CLASSES
from .readers import Clip
from .regularisers import REGULARISERS, CoreTuning, supervised_contrastive

BALANCES = ("none", "class")
SPLIT_BY = ("clip", "speaker")
JOB = "emotion_job"  # folder of a run's state
# What settings that were saved before these existed meant.
_BEFORE = {"regulariser": "supcon", "mixup_alpha": 1.0}


@dataclass(frozen=True)
class EmotionConfig:
    """Settings of one training run; saved beside its result.

    Attributes:
        hidden_dim, depth: of the head; 2048 and 5 as released. Depth 1 is a single linear layer.
        steps, batch_size: a batch is of windows of up to 3 s, drawn with replacement.
        learning_rate, weight_decay, warmup: of AdamW, with a linear warm-up over so many steps and a cosine to 5%. The
            gradient's norm is clipped to 1.
        contrastive_weight: share of the contrastive loss; 0 leaves the regulariser out. 0.1 as the authors of
            Core-tuning run it.
        temperature: of the contrastive loss; 0.07 as published for "core". Khosla et al. (2020) have 0.1 for "supcon".
        balance: "none" draws every window equally often, "class" every class.
        test_share: of each data set, 0.25 for 3:1.
        split_by: "clip", or "speaker" so that no voice is in both parts of a data set.
        seed: of the split, the initial weights and the batches.
        regulariser: "core", "supcon" (`regularisers`) or "none".
        mixup_alpha: of core's mixtures.
    """

    hidden_dim: int = 2048
    depth: int = 5
    steps: int = 20_000
    batch_size: int = 256
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 200
    contrastive_weight: float = 0.1
    temperature: float = 0.07
    balance: str = "none"
    test_share: float = 0.25
    split_by: str = "clip"
    seed: int = 0
    # Not in repr, by which a run begun before these existed knows its settings.
    regulariser: str = field(default="core", repr=False)
    mixup_alpha: float = field(default=1.0, repr=False)

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "depth", "steps", "batch_size", "warmup"):
            if getattr(self, name) < 1:
                raise EmotionError(f"{name} is {getattr(self, name)!r}; at least 1 is needed")
        for name, allowed in (("balance", BALANCES), ("split_by", SPLIT_BY), ("regulariser", REGULARISERS)):
            if getattr(self, name) not in allowed:
                raise EmotionError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not 0 < self.test_share < 1:
            raise EmotionError(f"test_share is {self.test_share!r}; it lies between 0 and 1, 0.25 for 3:1")
        if not (min(self.learning_rate, self.temperature, self.mixup_alpha) > 0 and self.contrastive_weight >= 0):
            raise EmotionError(
                f"learning_rate {self.learning_rate!r}, temperature {self.temperature!r} and mixup_alpha "
                f"{self.mixup_alpha!r} must be positive, contrastive_weight {self.contrastive_weight!r} at least 0"
            )
        if self.depth == 1 and self.regularised != "none":
            raise EmotionError(f"depth 1 has no hidden layer for the regulariser {self.regulariser!r}; give none")

    @property
    def regularised(self) -> str:
        """The regulariser that takes part."""
        return self.regulariser if self.contrastive_weight else "none"

    def linear(self) -> EmotionConfig:
        """The same for a single linear layer, the baseline of MEMO's figure 12."""
        return replace(self, depth=1, regulariser="none")

    def save(self, path: str | Path) -> None:
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> EmotionConfig:
        """Reads what `save` wrote. EmotionError for anything else."""
        stored = read_json(Path(path), lambda text: EmotionError(f"no settings of an emotion detector: {text}"))
        values = _BEFORE | stored
        for item in fields(cls):
            if item.name not in values or not fits(values[item.name], type(item.default)):
                raise EmotionError(
                    f"{path} holds no settings of an emotion detector: {item.name} is {shown(values.get(item.name))}"
                )
        return cls(**{item.name: type(item.default)(values[item.name]) for item in fields(cls)})


def split(clips: Sequence[Clip], test_share: float = 0.25, by: str = "clip", seed: int = 0) -> list[str]:
    """Divides each data set into parts: "train" or "test" per clip.

    Clips that already have a part keep it. Of the others of a data set with n recordings, the round(n test_share) that
    come first in an order hashed from the seed and their name are "test", so that neither the order of the list nor
    the place of the folder matters; all segments of a recording are on one side. By "speaker", whole speakers go, as
    many as come nearest to that number, and at least one stays on either side; a data set of one speaker (or of none
    known) is all "train".
    """
    parts = [clip.split for clip in clips]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, clip in enumerate(clips):
        if not clip.split:
            groups[clip.dataset].append(i)
    for members in groups.values():
        for i in members:
            parts[i] = "train"
        if by == "clip":
            names = {clips[i].path: clips[i].name or clips[i].path for i in members}
            order = sorted(names, key=lambda path: (_draw(seed, names[path]), path))
            tested = set(order[: round(len(names) * test_share)])
            chosen = [i for i in members if clips[i].path in tested]
        else:
            sizes = Counter(clips[i].speaker for i in members)
            order = sorted(sizes, key=lambda speaker: _draw(seed, speaker))
            counts = [sum(sizes[speaker] for speaker in order[:k]) for k in range(len(order))]
            best = min(range(1, len(order)), key=lambda k: abs(counts[k] - len(members) * test_share), default=0)
            chosen = [i for i in members if clips[i].speaker in order[:best]]
        for i in chosen:
            parts[i] = "test"
    return parts


def _draw(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogateescape")).digest()


def head_loss(
    head: EmotionHead,
    features: Tensor,
    labels: Tensor,
    config: EmotionConfig,
    core: CoreTuning | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, contrastive loss) of a batch of windows [B, C] with labels [B].

    With `core` and `rng` they are Core-tuning's. The contrastive loss is 0 where no regulariser takes part.
    """
    hidden, classifier = head.layers[:-1](features), head.layers[-1]
    if core is not None and rng is not None:
        return core(hidden, labels, classifier, rng)
    contrastive = hidden.new_zeros(())
    if config.regularised == "supcon":
        contrastive = supervised_contrastive(hidden, labels, config.temperature)
    return F.cross_entropy(classifier(hidden), labels), contrastive


def train(
    folder: Path,
    clips: Sequence[Clip],
    features: Sequence[Tensor],
    config: EmotionConfig,
    device: str = "cpu",
    save_every: float = 120.0,
) -> EmotionHead:
    """Trains a head on the clips whose part is "train" and writes it, as released, into misc/audio_emotion_classifier.

    Can be stopped at any step; the same call goes on from the last save, to the same weights.

    Args:
        folder: config.json, emotion_job/ and misc/ go here.
        clips: each with its part.
        features: per clip its windows [N, C].
        config: see there.
        device: where the head is trained.
        save_every: seconds between two saves.

    Raises:
        EmotionError: no clips to train on.
        ValueError: the folder holds a run on other data or with other settings.
    """
    chosen = [i for i, clip in enumerate(clips) if clip.split == "train"]
    if not chosen:
        raise EmotionError(f"none of the {len(clips)} clips is for training; look at clips.csv and rejected.csv")
    windows = torch.cat([features[i] for i in chosen]).to(device)
    labels = torch.cat([torch.full((len(features[i]),), clips[i].emotion) for i in chosen])
    weights = _weights(labels, config.balance)
    labels = labels.to(device)

    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed + 1)
    head = EmotionHead(windows.shape[1], config.hidden_dim, len(EMOTIONS), config.depth).to(device)
    modules: dict[str, nn.Module] = {"head": head}
    core = None
    if config.regularised == "core":
        modules["core"] = core = CoreTuning(config.hidden_dim, config.mixup_alpha, config.temperature).to(device)
    optimizer = torch.optim.AdamW(
        [p for module in modules.values() for p in module.parameters()],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    folder.mkdir(parents=True, exist_ok=True)
    settings = f"{config} on {_digest(clips, windows)}"
    if config.regulariser != _BEFORE["regulariser"]:
        settings += f", {config.regulariser} {config.mixup_alpha}"
    job = run.Job(folder / JOB, config.steps, modules, optimizer, generator, save_every, settings)
    config.save(folder / "config.json")
    head.train()
    for step in job.steps():
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * run.warmup_cosine(step, config.steps, config.warmup)
        drawn = _draw_batch(weights, config.batch_size, generator).to(device)
        rng = run.numpy_rng(generator) if core else None
        cross_entropy, contrastive = head_loss(head, windows[drawn], labels[drawn], config, core, rng)
        run.descend(optimizer, cross_entropy + config.contrastive_weight * contrastive)
        if step % 50 == 0:
            job.log(cross_entropy=cross_entropy.detach(), contrastive=contrastive.detach())
    head.eval().save_pretrained(folder / EMOTION_HEAD)
    return head


def _weights(labels: Tensor, balance: str) -> Tensor:
    """[N] float64: running sums of how often each window is to be drawn."""
    weights = torch.ones(len(labels), dtype=torch.float64)
    if balance == "class":
        weights = 1 / labels.bincount().double()[labels]
    return weights.cumsum(0)


def _draw_batch(weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[size] indices, drawn with replacement; torch.multinomial takes no more than 2^24 choices."""
    points = torch.rand(size, generator=generator, dtype=torch.float64) * weights[-1]
    return torch.searchsorted(weights, points, right=True).clamp_max(len(weights) - 1)


def _digest(clips: Sequence[Clip], windows: Tensor) -> str:
    digest = hashlib.sha256(repr([(c.dataset, c.path, c.emotion, c.split) for c in clips]).encode("utf-8", "replace"))
    digest.update(f"{tuple(windows.shape)} {windows.double().sum():.6f}".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def evaluate(head: EmotionHead, clips: Sequence[Clip], features: Sequence[Tensor]) -> dict[str, Any]:
    """Accuracy on the clips whose part is "test", per data set and over all, as in MEMO's figure 12.

    A clip's class is the most probable one after its windows' probabilities are averaged.

    Returns:
        {"sets": {key: {"train", "test": numbers of clips, "accuracy": correct / test, "recall": mean over its classes
        of the share found (unweighted average recall)}}, "all": the same over all clips, "mean": the mean of the sets'
        accuracies, "confusion": [8][9] counts, true class by predicted}; accuracy and recall are None without test
        clips.

    Raises EmotionError for a head that reads other features.
    """
    tested = [i for i, clip in enumerate(clips) if clip.split == "test"]
    weight = next(head.parameters())
    predicted: dict[int, int] = {}
    for i in tested:
        if features[i].shape[1] != head.feature_dim or head.classes != len(EMOTIONS):
            raise EmotionError(
                f"the head reads {head.feature_dim} features and knows {head.classes} classes; expected are "
                f"{features[i].shape[1]} and {len(EMOTIONS)}"
            )
        logits = head(features[i].to(weight.device, weight.dtype)).float()
        predicted[i] = int(logits.softmax(dim=1).mean(dim=0).argmax())

    def part(members: list[int]) -> dict[str, Any]:
        here = [i for i in members if i in predicted]
        hits: dict[int, list[bool]] = defaultdict(list)
        for i in here:
            hits[clips[i].emotion].append(predicted[i] == clips[i].emotion)
        correct = sum(map(sum, hits.values()))
        return {
            "train": sum(clips[i].split == "train" for i in members),
            "test": len(here),
            "accuracy": correct / len(here) if here else None,
            "recall": sum(sum(h) / len(h) for h in hits.values()) / len(hits) if hits else None,
        }

    members: dict[str, list[int]] = defaultdict(list)
    for i, clip in enumerate(clips):
        members[clip.dataset].append(i)
    sets = {name: part(members[name]) for name in sorted(members)}
    confusion = [[0] * len(EMOTIONS) for _ in CLASSES]
    for i, guess in predicted.items():
        confusion[clips[i].emotion][guess] += 1
    scores = [row["accuracy"] for row in sets.values() if row["accuracy"] is not None]
    return {
        "sets": sets,
        "all": part(list(range(len(clips)))),
        "mean": sum(scores) / len(scores) if scores else None,
        "confusion": confusion,
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with replace_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
