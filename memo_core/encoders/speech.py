"""The speech encoder: wav2vec 2.0 whose convolutional features are stretched to the video's frame rate.

The layers are those of the transformers library (Baevski et al. 2020, arXiv 2006.11477); the interpolation between the
convolutions and the transformer, one feature per video frame, is MEMO's (section 3.1, after EMO).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from ..checks import shown
from ..errors import CheckpointError
from ..files import replace_whole
from ..nets.config import LARGEST, require_layers, settings_like
from ..nets.weights import built, read_json, read_tensors
from ..tensorfile import save_tensors

SAMPLE_RATE = 16000

# What hidden states depend on, with wav2vec 2.0 base's values. Nothing else of a configuration reaches transformers,
# which would, for one, fetch and run the attention that a file names.
_SETTINGS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.1,
    "layerdrop": 0.1,
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": (512,) * 7,
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "add_adapter": False,
    "mask_time_prob": 0.05,
    "mask_feature_prob": 0.0,
}
# Entries of published wav2vec 2.0 files that hidden states do not need: the CTC head, the pre-training
# quantiser and its projections, and the embedding that stands for masked frames.
_UNUSED = ("lm_head.", "quantizer.", "project_q.", "project_hid.", "masked_spec_embed")


class SpeechEncoder(nn.Module):
    """wav2vec 2.0 at video frame rate; state-dict names equal those of transformers' Wav2Vec2Model.

    LayerDrop and SpecAugment, which the configuration may name, are never applied; dropout is, in training mode.

    Args:
        config: sizes; `do_stable_layer_norm` and `add_adapter` are not supported.
        normalize: whether recordings are to be brought to zero mean and unit variance before `forward`
            (`do_normalize` of preprocessor_config.json).
    """

    def __init__(self, config: Wav2Vec2Config, normalize: bool = True):
        super().__init__()
        for name in ("do_stable_layer_norm", "add_adapter"):
            if getattr(config, name):
                raise CheckpointError(f"speech encoder: {name} = True is not supported, only False is")
        self.config = config
        self.normalize = normalize
        model = Wav2Vec2Model(config)
        self.feature_extractor = model.feature_extractor
        self.feature_projection = model.feature_projection
        self.encoder = model.encoder
        if self.min_samples > LARGEST:
            raise CheckpointError(
                f"speech encoder: its first feature takes {self.min_samples} samples, at most {LARGEST}"
            )

    @property
    def num_layers(self) -> int:
        """L, the number of hidden states that `forward` returns per frame (released: 12)."""
        return self.config.num_hidden_layers

    @property
    def hidden_dim(self) -> int:
        """C, the width of a hidden state (released: 768)."""
        return self.config.hidden_size

    @property
    def min_samples(self) -> int:
        """Samples that the convolutions need to make one feature (400 for the released sizes)."""
        samples = 1
        for kernel, stride in zip(reversed(self.config.conv_kernel), reversed(self.config.conv_stride)):
            samples = (samples - 1) * stride + kernel
        return samples

    def working_bytes(self, seconds: float) -> int:
        """What encoding so many seconds at once takes besides the weights, about: three maps of the first convolution,
        whose features are the most numerous (1.8 GiB each for 300 s at released sizes)."""
        features = seconds * SAMPLE_RATE / self.config.conv_stride[0]
        return int(3 * 4 * features * self.config.conv_dim[0])

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
        hidden, _ = self.feature_projection(features)
        hidden = hidden + self.encoder.pos_conv_embed(hidden)
        hidden = self.encoder.dropout(self.encoder.layer_norm(hidden))
        states = []
        for layer in self.encoder.layers:
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5
            states.append(hidden)
        stacked = torch.stack(states, dim=2)
        return stacked[0] if len(stacked) == 1 else stacked

    @classmethod
    def from_config(cls, config: Wav2Vec2Config | dict[str, Any], normalize: bool = True) -> SpeechEncoder:
        """A fresh encoder; `config` holds any of Wav2Vec2Config's settings."""
        if isinstance(config, dict):
            config = Wav2Vec2Config(**config)
        return cls(config, normalize)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> SpeechEncoder:
        """Reads a folder as transformers writes it: config.json, preprocessor_config.json (optional) and
        model.safetensors or pytorch_model.bin, of the bare model or of the one with a CTC head.

        Raises CheckpointError when a file is absent or anything in it does not fit.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        if config.get("model_type") != "wav2vec2":
            raise CheckpointError(
                f"{folder}/config.json: model_type {shown(config.get('model_type'))} is not 'wav2vec2'"
            )
        preprocessing = folder / "preprocessor_config.json"
        settings = read_json(preprocessing) if preprocessing.is_file() else {}
        if settings.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
            raise CheckpointError(
                f"{preprocessing}: sampling_rate {shown(settings['sampling_rate'])} is not {SAMPLE_RATE}"
            )
        path = folder / "model.safetensors"
        if not path.is_file():
            path = folder / "pytorch_model.bin"
        if not path.is_file():
            raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
        settings = settings_like(settings, {"do_normalize": True}, preprocessing)
        config = settings_like(config, _SETTINGS, folder / "config.json")
        tensors = {_rename(name): value for name, value in read_tensors(path).items() if not _unused(name)}
        require_layers(config["num_hidden_layers"], len(tensors), folder / "config.json")
        config |= {name: list(value) for name, value in config.items() if isinstance(value, tuple)}
        return built(lambda: cls.from_config(config, settings["do_normalize"]), tensors, path, dtype, device)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that `from_pretrained` and transformers read; `dtype` only changes the file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # No masking in training, so that transformers does not look for the embedding of masked frames.
        config = Wav2Vec2Config.from_dict(self.config.to_dict() | {"mask_time_prob": 0.0})
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


def _unused(name: str) -> bool:
    return name.removeprefix("wav2vec2.").startswith(_UNUSED)


def _rename(name: str) -> str:
    """Names in older files: a prefix before the bare model, and weight norm stored as weight_g and weight_v."""
    name = name.removeprefix("wav2vec2.")
    name = name.replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
    return name.replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1")
