"""The emotion head: pooled emotion2vec features -> nine emotion classes (MEMO appendix A.2)."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import replace_whole
from ..nets.config import require_layers
from ..nets.weights import WEIGHTS, built, read_tensors
from ..tensorfile import save_tensors
from .files import head_sizes


class EmotionHead(nn.Module):
    """Linear layers with ReLU between them, named layers.fc1, layers.fc2, ... as in the released checkpoint.

    Args:
        feature_dim: width of the emotion features (released: 1024).
        hidden_dim: width of the hidden layers (2048).
        classes: number of emotions (9).
        depth: number of linear layers, at least 1 (5); a single one has no hidden layer.

    Attributes:
        feature_dim, classes: as given.
    """

    def __init__(self, feature_dim: int = 1024, hidden_dim: int = 2048, classes: int = 9, depth: int = 5):
        super().__init__()
        if depth < 1:
            raise CheckpointError(f"an emotion head needs at least 1 layer, got {depth}")
        self.feature_dim, self.classes = feature_dim, classes
        widths = [feature_dim] + [hidden_dim] * (depth - 1) + [classes]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, depth + 1):
            layers[f"fc{i}"] = nn.Linear(widths[i - 1], widths[i])
            if i < depth:
                layers[f"relu{i}"] = nn.ReLU()
        self.layers = nn.Sequential(layers)

    def forward(self, features: Tensor) -> Tensor:
        """Features averaged over time [B, C] -> logits [B, classes]; their softmax over dim 1 are the probabilities."""
        return self.layers(features)

    @classmethod
    def from_config(cls, config: dict[str, int]) -> EmotionHead:
        """A fresh head; `config` holds any of feature_dim, hidden_dim, classes, depth."""
        return cls(**config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> EmotionHead:
        """Reads a folder of the released layout. Its config.json gives no sizes, so they come from the tensors' shapes.

        Raises CheckpointError when the file is absent or its tensors do not form such a head.
        """
        path = Path(folder) / WEIGHTS
        tensors = read_tensors(path)
        shapes = {name: value.shape for name, value in tensors.items()}
        feature_dim, hidden_dim, classes, depth = head_sizes(shapes, path)
        require_layers(depth, 100, path)
        return built(lambda: cls(feature_dim, hidden_dim, classes, depth), tensors, path, dtype, device)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the released layout into `folder`; `dtype` (for example torch.float16) only changes the file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replace_whole(folder / "config.json") as temporary:
            temporary.write_text(json.dumps({"_class_name": "AudioEmotionClassifierModel"}, indent=2) + "\n")
        tensors = {name: value.to(dtype=dtype or value.dtype).contiguous() for name, value in self.state_dict().items()}
        save_tensors(tensors, folder / WEIGHTS)
