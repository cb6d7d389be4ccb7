"""Contrastive regularisers of the emotion head (MEMO appendix A.2).

`core` is Core-tuning (Zhang et al. 2021, "Unleashing the power of contrastive self-supervised visual models via
contrast-regularized fine-tuning"), the one that MEMO cites; `supcon` is the plain loss of Khosla et al. 2020.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

REGULARISERS = ("core", "supcon", "none")
PROJECTION_DIM = 256  # as in Core-tuning's published code
NEGATIVE_SHARE = 0.8  # at least so much of a hard negative is of the other class; as published


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss: pulls features of one class together and the others apart.

    Khosla et al. 2020 (arXiv 2004.11362, equation 2, "L_out"), on the head's last hidden layer, without a projection of
    its own: mean over anchors i of -1/|P(i)| sum over p in P(i) of log softmax over a != i of (z_i . z_a / temperature)
    at p, where z are the features at unit length and P(i) the others of i's class. Anchors alone in their class do not
    count.

    Args:
        features: [B, C].
        labels: [B] int64.
        temperature: above 0.

    Returns:
        a scalar, 0 where no class occurs twice.
    """
    unit = F.normalize(features, dim=1)
    alone = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = (unit @ unit.T / temperature).masked_fill(alone, float("-inf"))
    log_share = (similarity - similarity.logsumexp(dim=1, keepdim=True)).masked_fill(alone, 0)
    partners = (labels[:, None] == labels) & ~alone
    counts = partners.sum(dim=1)
    per_anchor = -(log_share * partners).sum(dim=1) / counts.clamp_min(1)
    return per_anchor.sum() / (counts > 0).sum().clamp_min(1)


def hard_pairs(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's hardest positive and hardest negative, by the cosine of their features.

    Args:
        features: [B, C].
        labels: [B] int64.

    Returns:
        [B] indices of the least similar other sample of its class, and of the most similar sample of another class;
        where there is none, the sample's own.
    """
    unit = F.normalize(features, dim=1)
    similarity, own = unit @ unit.T, torch.arange(len(labels), device=labels.device)
    same = labels[:, None] == labels
    positives = same & (own[:, None] != own)
    hardest = similarity.masked_fill(~positives, float("inf")).argmin(dim=1)
    nearest = similarity.masked_fill(same, float("-inf")).argmax(dim=1)
    return torch.where(positives.any(dim=1), hardest, own), torch.where(same.all(dim=1), own, nearest)


def mix_hard_pairs(
    features: Tensor, targets: Tensor, labels: Tensor, rng: np.random.Generator, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Core-tuning's hard positive and hard negative of each sample, mixed from the batch.

    The positive is share * hardest positive + (1 - share) * hardest negative with share ~ Beta(alpha, alpha); the
    negative is share * another + (1 - share) * the sample, `another` being any of another class, with share drawn so,
    too, and at least NEGATIVE_SHARE. Targets are mixed as the features are.

    Args:
        features: [B, C].
        targets: [B, K] shares of the classes.
        labels: [B] int64.
        rng: draws shares and partners.
        alpha: above 0.

    Returns:
        features [2 B, C] and targets [2 B, K]: all positives, then all negatives.
    """
    hardest, nearest = hard_pairs(features.detach(), labels)
    draws = torch.from_numpy(rng.random((len(labels), len(labels)))).to(labels.device)
    another = draws.masked_fill(labels[:, None] == labels, -1).argmax(dim=1)
    shares = rng.beta(alpha, alpha, (2, len(labels), 1))
    shares[1] = shares[1].clip(NEGATIVE_SHARE)
    positive, negative = torch.from_numpy(shares).to(features)

    def mixed(values: Tensor) -> Tensor:
        return torch.cat(
            [
                positive * values[hardest] + (1 - positive) * values[nearest],
                negative * values[another] + (1 - negative) * values,
            ]
        )

    return mixed(features), mixed(targets)


def focal_contrastive(
    anchors: Tensor, labels: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.07
) -> Tensor:
    """Core-tuning's focal contrastive loss: pairs that are far from being told count more.

    Mean over anchors i of -1/|P(i)| sum over p in P(i) of (1 - s_ip) log s_ip, where s_i is the softmax over A(i) of
    (z_i . z_a / temperature), z are the features at unit length, P(i) holds the others of i's class and i's hard
    positive, and A(i) all other anchors and i's hard positive and hard negative.

    Args:
        anchors: [B, C].
        labels: [B] int64.
        positives, negatives: [B, C], those of `mix_hard_pairs`; a negative counts only where there is another class.
        temperature: above 0.
    """
    anchors, positives, negatives = (F.normalize(x, dim=1) for x in (anchors, positives, negatives))
    alone = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == labels
    similarity = torch.cat(
        [
            (anchors @ anchors.T).masked_fill(alone, float("-inf")),
            (anchors * positives).sum(dim=1, keepdim=True),
            (anchors * negatives).sum(dim=1, keepdim=True).masked_fill(same.all(dim=1, keepdim=True), float("-inf")),
        ],
        dim=1,
    )
    one = torch.ones_like(alone[:, :1])
    partners = torch.cat([same & ~alone, one, ~one], dim=1)
    log_share = (similarity / temperature).log_softmax(dim=1).masked_fill(~partners, 0)
    per_anchor = ((log_share.exp() - 1) * log_share).sum(dim=1) / partners.sum(dim=1)
    return per_anchor.mean()


class CoreTuning(nn.Module):
    """Contrast-regularised tuning of a classifier; its projection is needed in training only.

    Read from the authors' published code (github.com/Vanint/Core-tuning) and its README: hard pairs, their mixture and
    the bound of the negatives' share, the focal weight, the temperature of 0.07, the projection of two layers to 256,
    and the cross-entropy over samples and mixtures. The paper's own text and equations were not at hand, so some things
    are this project's reading: the hardest positive is the least similar of the others, and a negative's partner is of
    another class (in the code any other sample is); an anchor's mixed positive is one of its positives, and its mixed
    negative in its denominator alone (in the code a mixture's positives are those of equal target, which it seldom
    has); the sum over positives is divided by their number (in the code by that of all); and features of samples that
    are not mixed pass their gradient on (in the code they are detached).

    Args:
        width: of the features that are classified.
        alpha: of the Beta distribution of the mixtures' shares; 1 is uniform, as published.
        temperature: of the contrastive loss.
    """

    def __init__(self, width: int, alpha: float = 1.0, temperature: float = 0.07) -> None:
        super().__init__()
        self.alpha, self.temperature = alpha, temperature
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION_DIM))

    def forward(
        self, features: Tensor, labels: Tensor, classifier: nn.Linear, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """(cross-entropy over samples and mixtures, focal contrastive loss) of features [B, C] with labels [B]."""
        targets = F.one_hot(labels, classifier.out_features).to(features)
        hard, hard_targets = mix_hard_pairs(features, targets, labels, rng, self.alpha)
        everything = torch.cat([features, hard])
        cross_entropy = F.cross_entropy(classifier(everything), torch.cat([targets, hard_targets]))
        anchors, positives, negatives = self.projection(everything).chunk(3)
        return cross_entropy, focal_contrastive(anchors, labels, positives, negatives, self.temperature)
