"""emotion2vec: speech -> emotion features (Ma et al. 2023, arXiv 2312.15185), a data2vec 2.0 encoder of speech.

Inference and fine-tuning of the encoder only: no masking, no decoder, no teacher. Parameter names equal those of the
released model.pt.
"""

from __future__ import annotations

import ast
import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import shown
from ..errors import CheckpointError
from ..files import replace_whole
from ..nets.config import DEEPEST, LARGEST, require_layers
from ..nets.weights import built, read_tensors
from .files import emotion_settings, emotion_weights, read_emotion_config


class Emotion2Vec(nn.Module):
    """The emotion2vec encoder.

    Args:
        config: the `model_conf` part of a released config.yaml, or the whole of it; absent settings take emotion2vec
            base's values. LayerDrop and stochastic depth, which it may name, are never applied; dropout is, in training
            mode.
        num_tensors: that the encoder's file holds; a configuration of more layers is refused before they are built.

    Raises:
        CheckpointError: for a setting that is not implemented.
    """

    def __init__(self, config: dict[str, Any], num_tensors: int = 100 * DEEPEST):
        super().__init__()
        conf, audio = emotion_settings(config)
        require_layers(conf["depth"] + audio["prenet_depth"] + audio["conv_pos_depth"], num_tensors, "emotion2vec")
        self.config: dict[str, Any] = {"model": "Emotion2vec"}
        self.config["model_conf"] = copy.deepcopy(conf | {"modalities": {"audio": audio}})
        self.modality_encoders = nn.ModuleDict({"AUDIO": _AudioEncoder(conf, audio)})
        self.dropout_input = nn.Dropout(conf["dropout_input"])
        self.blocks = nn.ModuleList(_Block(conf) for _ in range(conf["depth"]))
        self.apply(_init_weights)

    @property
    def feature_dim(self) -> int:
        """C, the width of a feature (emotion2vec plus large: 1024)."""
        return self.config["model_conf"]["embed_dim"]

    @property
    def min_samples(self) -> int:
        """Samples that the convolutions need to make one feature (400 for the released sizes)."""
        return self._audio.min_samples

    @property
    def _audio(self) -> _AudioEncoder:
        audio = self.modality_encoders["AUDIO"]
        assert isinstance(audio, _AudioEncoder)
        return audio

    def forward(self, waveform: Tensor) -> Tensor:
        """Recordings -> features.

        Args:
            waveform: [B, T] at 16 kHz, each row with zero mean and unit variance (`torch.nn.functional.layer_norm` over
                the row); shorter ones than `min_samples` are continued by zeros.

        Returns:
            [B, T', C], about 50 features a second.
        """
        waveform = F.pad(waveform, (0, max(0, self.min_samples - waveform.shape[-1])))
        hidden, bias = self._audio(waveform)
        hidden = self.dropout_input(hidden)
        for block in self.blocks:
            hidden = block(hidden, bias)
        return hidden[:, self._audio.extra_tokens.shape[1] :]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Emotion2Vec:
        """A fresh encoder; see the class for `config`."""
        return cls(config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Emotion2Vec:
        """Reads model.pt and config.yaml of a released emotion2vec.

        Tensors are found where `files.emotion_weights` looks; decoder, teacher and classification head are skipped.

        Raises CheckpointError when a file is absent or anything else in it does not fit.
        """
        folder = Path(folder)
        config = read_emotion_config(folder / "config.yaml")
        path = folder / "model.pt"
        tensors = emotion_weights(read_tensors(path), config)
        return built(lambda: cls(config, len(tensors)), tensors, path, dtype, device)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes model.pt and config.yaml into `folder`; `dtype` (for example torch.float16) only changes the file."""
        import yaml

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config, sort_keys=True)
        with replace_whole(folder / "config.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")
        tensors = {name: value.to("cpu", dtype or value.dtype) for name, value in self.state_dict().items()}
        with replace_whole(folder / "model.pt") as temporary:
            torch.save({"model": tensors}, temporary)


class _AudioEncoder(nn.Module):
    """Waveform -> local features -> positions and extra tokens -> the first transformer blocks (the "prenet")."""

    def __init__(self, conf: dict[str, Any], audio: dict[str, Any]):
        super().__init__()
        dim = conf["embed_dim"]
        layers = _parse_layers(audio["feature_encoder_spec"])
        self.min_samples = 1
        for _, kernel, stride in reversed(layers):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        if self.min_samples > LARGEST:
            raise CheckpointError(f"emotion2vec: the first feature takes {self.min_samples} samples, at most {LARGEST}")
        conv_layers = nn.ModuleList()
        width = 1
        for channels, kernel, stride in layers:
            # The placeholders keep the released names: 0 is the convolution, 2.1 its norm.
            conv_layers.append(
                nn.Sequential(
                    nn.Conv1d(width, channels, kernel, stride, bias=False),
                    nn.Identity(),
                    nn.Sequential(nn.Identity(), _ChannelNorm(channels)),
                    nn.GELU(),
                )
            )
            width = channels
        self.local_encoder = nn.ModuleDict({"conv_layers": conv_layers})
        self.project_features = nn.Sequential(nn.Identity(), nn.LayerNorm(width), nn.Linear(width, dim))
        kernel = max(3, audio["conv_pos_width"] // audio["conv_pos_depth"])
        groups = audio["conv_pos_groups"]
        self.relative_positional_encoder = nn.Sequential(
            nn.Identity(),
            *[
                nn.Sequential(
                    nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups),
                    _TrimEven(kernel),
                    _ChannelNorm(dim, elementwise_affine=False),
                    nn.GELU(),
                )
                for _ in range(audio["conv_pos_depth"])
            ],
        )
        extra = nn.init.zeros_(torch.empty(1, audio["num_extra_tokens"], dim))
        nn.init.normal_(extra[:, 1:])
        self.extra_tokens = nn.Parameter(extra)
        scale = torch.empty(1, 1, audio["num_alibi_heads"], 1, 1)
        self.alibi_scale = nn.Parameter(nn.init.constant_(scale, float(audio["alibi_scale"])))
        self.num_heads = conf["num_heads"]
        self.context_encoder = nn.ModuleDict(
            {
                "blocks": nn.ModuleList(_Block(conf) for _ in range(audio["prenet_depth"])),
                "norm": nn.LayerNorm(dim, eps=conf["norm_eps"]),
                "dropout": nn.Dropout(audio["prenet_dropout"]),
            }
        )

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] -> hidden states [B, extra tokens + T', C] and the attention bias [1, heads, N, N]."""
        hidden = waveform[:, None]
        for layer in self.local_encoder["conv_layers"].children():
            hidden = layer(hidden)
        hidden = self.project_features(hidden.transpose(1, 2))
        hidden = hidden + self.relative_positional_encoder(hidden.transpose(1, 2)).transpose(1, 2)
        bias = self._alibi(hidden)
        hidden = torch.cat([self.extra_tokens.expand(len(hidden), -1, -1), hidden], dim=1)
        hidden = self.context_encoder["dropout"](self.context_encoder["norm"](hidden))
        for block in self.context_encoder["blocks"].children():
            hidden = block(hidden, bias)
        return hidden, bias

    def _alibi(self, hidden: Tensor) -> Tensor:
        """Symmetric ALiBi (Press et al. 2021): minus the distance in time, times a slope per head, times a learned
        scale. Extra tokens have no place in time, hence no bias; heads beyond the ALiBi ones have none either.
        """
        position = torch.arange(hidden.shape[1], device=hidden.device)
        distance = (position[:, None] - position).abs().to(hidden.dtype)
        scale = self.alibi_scale.clamp_min(0)[0, 0]  # [alibi heads, 1, 1]
        slopes = torch.tensor(_slopes(len(scale)), device=hidden.device, dtype=hidden.dtype)[:, None, None]
        extra = self.extra_tokens.shape[1]
        return F.pad(-distance * slopes * scale, (extra, 0, extra, 0, 0, self.num_heads - len(scale)))[None]


class _Block(nn.Module):
    """Transformer block with the norms after the sums."""

    def __init__(self, conf: dict[str, Any]):
        super().__init__()
        dim, hidden = conf["embed_dim"], int(conf["embed_dim"] * conf["mlp_ratio"])
        self.norm1 = nn.LayerNorm(dim, eps=conf["norm_eps"])
        self.norm2 = nn.LayerNorm(dim, eps=conf["norm_eps"])
        self.attn = _Attention(dim, conf["num_heads"], conf["attention_dropout"], conf["encoder_dropout"])
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(dim, hidden),
                "fc2": nn.Linear(hidden, dim),
                "dropout": nn.Dropout(conf["activation_dropout"]),
            }
        )
        self.post_mlp_dropout = nn.Dropout(conf["post_mlp_drop"])

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """[B, N, C], [1, heads, N, N] -> [B, N, C]."""
        hidden = self.norm1(hidden + self.attn(hidden, bias))
        update = self.mlp["dropout"](F.gelu(self.mlp["fc1"](hidden)))
        update = self.mlp["dropout"](self.mlp["fc2"](update))
        return self.norm2(hidden + self.post_mlp_dropout(update))


class _Attention(nn.Module):
    """Self-attention with an additive bias."""

    def __init__(self, dim: int, heads: int, attention_dropout: float, output_dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_dropout = nn.Dropout(output_dropout)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """[B, N, C], [1, heads, N, N] -> [B, N, C]."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0
        )
        return self.proj_dropout(self.proj(out.transpose(1, 2).flatten(2)))


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, T], computed in float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        normed = F.layer_norm(hidden.transpose(1, 2).float(), self.normalized_shape, weight, bias, self.eps)
        return normed.transpose(1, 2).to(hidden.dtype)


class _TrimEven(nn.Module):
    """Drops the one frame by which padding lengthens the output of an even kernel."""

    def __init__(self, kernel: int):
        super().__init__()
        self.trim = 1 - kernel % 2

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., : hidden.shape[-1] - self.trim]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv1d):
        nn.init.kaiming_normal_(module.weight)


def _slopes(heads: int) -> list[float]:
    """ALiBi's geometric slopes; for a number of heads that is no power of two, those of the next lower power and then
    every other one of the next higher.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (i + 1) / power) for i in range(2 * power)][::2][: heads - power]


def _parse_layers(text: str) -> list[tuple[int, int, int]]:
    """Reads "[(512, 10, 5)] + [(512, 3, 2)] * 4" as channels, kernel, stride per layer, without running it as code."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Tuple(elts=items):
                return tuple(value(item) for item in items)
            case ast.List(elts=items):
                return [value(item) for item in items]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return bounded(value(left) + value(right))
            case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))) if 0 < times <= 100:
                return bounded(value(left) * times)
        raise ValueError(ast.dump(node)[:100])

    def bounded(layers: list) -> list:  # a hundred times a hundred times ...
        if not isinstance(layers, list) or len(layers) > 100:
            raise ValueError("too many layers")
        return layers

    try:
        layers = value(ast.parse(text, mode="eval").body)
        if not layers or any(len(layer) != 3 or min(layer) < 1 or max(layer) > LARGEST for layer in layers):
            raise ValueError(layers)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"emotion2vec: feature_encoder_spec {shown(text)} is not a list of (channels, kernel, stride)"
        ) from error
    return layers
