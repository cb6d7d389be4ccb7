"""The speech encoder: wav2vec 2.0 whose convolutional features are stretched to the video's frame rate.

The layers are wav2vec 2.0's (Baevski et al. 2020, arXiv 2006.11477), with the numbers and names of transformers'
Wav2Vec2Model; all hidden states are used (MEMO appendix D). The interpolation between the convolutions and the
transformer, one feature per video frame, is the release's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ..checks import shown
from ..errors import CheckpointError
from ..files import replace_whole
from ..nets.config import LARGEST, require_layers
from ..nets.weights import built, load_strict, read_tensors
from ..release import SAMPLE_RATE
from ..tensorfile import save_tensors
from .files import SPEECH_SETTINGS, find_speech, speech_weights

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class SpeechEncoder(nn.Module):
    """wav2vec 2.0 at video frame rate; state-dict names equal those of transformers' Wav2Vec2Model.

    LayerDrop and SpecAugment, which the configuration may name, are never applied; dropout is, in training mode.

    Args:
        config: sizes, any of Wav2Vec2Config's settings by name; `do_stable_layer_norm` and `add_adapter` are not
            supported.
        normalize: whether recordings are to be brought to zero mean and unit variance before `forward`
            (`do_normalize` of preprocessor_config.json).

    Raises:
        CheckpointError: for a variant that is not implemented.
        ValueError: for settings that are not understood, or contradict each other.
    """

    def __init__(self, config: Mapping[str, Any], normalize: bool = True):
        super().__init__()
        self.config = {**SPEECH_SETTINGS, **config}
        self.normalize = normalize
        _check(self.config)
        if self.min_samples > LARGEST:
            raise CheckpointError(
                f"speech encoder: its first feature takes {self.min_samples} samples, at most {LARGEST}"
            )
        self.feature_extractor = _FeatureExtractor(self.config)
        self.feature_projection = _FeatureProjection(self.config)
        self.encoder = _Transformer(self.config)

    @property
    def num_layers(self) -> int:
        """L, the number of hidden states that `forward` returns per frame (released: 12)."""
        return self.config["num_hidden_layers"]

    @property
    def hidden_dim(self) -> int:
        """C, the width of a hidden state (released: 768)."""
        return self.config["hidden_size"]

    @property
    def min_samples(self) -> int:
        """Samples that the convolutions need to make one feature (400 for the released sizes)."""
        samples = 1
        for kernel, stride in zip(reversed(self.config["conv_kernel"]), reversed(self.config["conv_stride"])):
            samples = (samples - 1) * stride + kernel
        return samples

    def working_bytes(self, seconds: float) -> int:
        """What encoding so many seconds at once takes besides the weights, about: three maps of the first convolution,
        whose features are the most numerous (1.8 GiB each for 300 s at released sizes).
        """
        features = seconds * SAMPLE_RATE / self.config["conv_stride"][0]
        return int(3 * 4 * features * self.config["conv_dim"][0])

    def forward(self, waveform: Tensor, num_frames: int) -> Tensor:
        """Encodes recordings, one set of hidden states per video frame.

        Args:
            waveform: [B, T] at 16 kHz, normalised if `normalize`; shorter ones than `min_samples` are continued by
                zeros.
            num_frames: F, the number of video frames that the T samples span.

        Returns:
            [F, L, C] if B is 1, else [B, F, L, C]: the output of every transformer layer.
        """
        waveform = F.pad(waveform, (0, max(0, self.min_samples - waveform.shape[-1])))
        features = self.feature_extractor(waveform)  # [B, C, T']
        features = F.interpolate(features, size=num_frames, mode="linear", align_corners=True).transpose(1, 2)
        states = self.encoder(self.feature_projection(features))
        stacked = torch.stack(states, dim=2)
        return stacked[0] if len(stacked) == 1 else stacked

    @classmethod
    def from_config(cls, config: Mapping[str, Any], normalize: bool = True) -> SpeechEncoder:
        """A fresh encoder, with the transformers library's random weights; see the class for `config`.

        Raises CheckpointError without that library.
        """
        transformers = _transformers()
        with torch.device("meta"):
            encoder = cls(config, normalize)
        weights = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**config)).state_dict()
        load_strict(encoder, speech_weights(weights), "a fresh Wav2Vec2Model")
        return encoder

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> SpeechEncoder:
        """Reads a folder as transformers writes it: config.json, preprocessor_config.json (optional) and
        model.safetensors or pytorch_model.bin, of the bare model or of the one with a CTC head.

        Raises CheckpointError when a file is absent or anything in it does not fit.
        """
        folder = Path(folder)
        config, normalize, path = find_speech(folder)
        tensors = speech_weights(read_tensors(path))
        require_layers(config["num_hidden_layers"], len(tensors), folder / "config.json")
        return built(lambda: cls(config, normalize), tensors, path, dtype, device)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that `from_pretrained` and transformers read; `dtype` only changes the file.

        Raises CheckpointError without the transformers library, whose settings the file has.
        """
        transformers = _transformers()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        given: dict[str, Any] = {key: list(v) if isinstance(v, tuple) else v for key, v in self.config.items()}
        given["mask_time_prob"] = 0.0  # so that transformers does not look for the embedding of masked frames
        config = transformers.Wav2Vec2Config(**given)
        config.architectures = ["Wav2Vec2Model"]
        config.save_pretrained(folder)
        settings = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
            "sampling_rate": SAMPLE_RATE,
            "do_normalize": self.normalize,
        }
        with replace_whole(folder / "preprocessor_config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        tensors = {name: value.to(dtype=dtype or value.dtype).contiguous() for name, value in self.state_dict().items()}
        save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            'making or writing a speech encoder needs transformers: pip install "comfyui-memo[training]"'
        ) from error
    return transformers


def _check(config: Mapping[str, Any]) -> None:
    for name in ("do_stable_layer_norm", "add_adapter"):
        if config[name]:
            raise CheckpointError(f"speech encoder: {name} = True is not supported, only False is")
    for name, allowed in (
        ("hidden_act", tuple(_ACTIVATIONS)),
        ("feat_extract_activation", tuple(_ACTIVATIONS)),
        ("feat_extract_norm", ("group", "layer")),
    ):
        if config[name] not in allowed:
            raise ValueError(f"{name} = {shown(config[name])}; allowed are {', '.join(allowed)}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(f"num_attention_heads {config['num_attention_heads']} does not divide {config['hidden_size']}")
    lengths = [len(config[name]) for name in ("conv_dim", "conv_kernel", "conv_stride")]
    if len(set(lengths)) > 1:
        raise ValueError(f"conv_dim, conv_kernel and conv_stride have {lengths} layers")


class _FeatureExtractor(nn.Module):
    """Waveforms [B, T] -> local features [B, C, T']."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.conv_layers = nn.ModuleList(_Convolution(config, i) for i in range(len(config["conv_dim"])))

    def forward(self, waveform: Tensor) -> Tensor:
        hidden = waveform[:, None]
        for layer in self.conv_layers:
            hidden = layer(hidden)
        return hidden


class _Convolution(nn.Module):
    """One layer of them: normalised over time ("group", the first alone) or over channels ("layer", each)."""

    def __init__(self, config: Mapping[str, Any], number: int):
        super().__init__()
        widths = (1, *config["conv_dim"])
        self.conv = nn.Conv1d(
            widths[number],
            widths[number + 1],
            config["conv_kernel"][number],
            config["conv_stride"][number],
            bias=config["conv_bias"],
        )
        self.layer_norm: nn.Module | None = None
        if config["feat_extract_norm"] == "layer":
            self.layer_norm = nn.LayerNorm(widths[number + 1])
        elif number == 0:
            self.layer_norm = nn.GroupNorm(widths[1], widths[1])
        self.activation = _ACTIVATIONS[config["feat_extract_activation"]]

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv(hidden)
        if isinstance(self.layer_norm, nn.LayerNorm):
            hidden = self.layer_norm(hidden.transpose(1, 2)).transpose(1, 2)
        elif self.layer_norm is not None:
            hidden = self.layer_norm(hidden)
        return self.activation(hidden)


class _FeatureProjection(nn.Module):
    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config["conv_dim"][-1], eps=config["layer_norm_eps"])
        self.projection = nn.Linear(config["conv_dim"][-1], config["hidden_size"])
        self.dropout = nn.Dropout(config["feat_proj_dropout"])

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(self.projection(self.layer_norm(features)))


class _Transformer(nn.Module):
    """[B, F, C] -> the output of every layer, each [B, F, C]; places in time come from a convolution."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.pos_conv_embed = _Positions(config)
        self.layer_norm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout"])
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, hidden: Tensor) -> list[Tensor]:
        hidden = self.dropout(self.layer_norm(hidden + self.pos_conv_embed(hidden)))
        states = []
        for layer in self.layers:
            hidden = layer(hidden)
            states.append(hidden)
        return states


class _Positions(nn.Module):
    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        width, kernel = config["hidden_size"], config["num_conv_pos_embeddings"]
        groups = config["num_conv_pos_embedding_groups"]
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        register_parametrization(self.conv, "weight", _WeightNorm(), unsafe=True)
        self.activation = _ACTIVATIONS[config["feat_extract_activation"]]

    def forward(self, hidden: Tensor) -> Tensor:
        placed = self.conv(hidden.transpose(1, 2))[..., : hidden.shape[1]]  # an even kernel makes one more
        return self.activation(placed).transpose(1, 2)


class _WeightNorm(nn.Module):
    """A weight [out, in, K] as its lengths [1, 1, K] and its directions [out, in, K], under the names torch gives them.

    torch's own would compute the lengths of a weight that is about to be loaded.
    """

    def forward(self, lengths: Tensor, directions: Tensor) -> Tensor:
        return torch._weight_norm(directions, lengths, 2)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.new_ones(1, 1, weight.shape[2]), weight


class _Layer(nn.Module):
    """Transformer block with the norms after the sums."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        width = config["hidden_size"]
        self.attention = _Attention(width, config["num_attention_heads"], config["attention_dropout"])
        self.dropout = nn.Dropout(config["hidden_dropout"])
        self.layer_norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.feed_forward = _FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.layer_norm(hidden + self.dropout(self.attention(hidden)))
        return self.final_layer_norm(hidden + self.feed_forward(hidden))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            project(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.intermediate_dropout = nn.Dropout(config["activation_dropout"])
        self.intermediate_dense = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.activation = _ACTIVATIONS[config["hidden_act"]]
        self.output_dense = nn.Linear(config["intermediate_size"], config["hidden_size"])
        self.output_dropout = nn.Dropout(config["hidden_dropout"])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.intermediate_dropout(self.activation(self.intermediate_dense(hidden)))
        return self.output_dropout(self.output_dense(hidden))
