"""The networks of others, written here, against the libraries they come from: the same names and the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memo_core.checkpoint.rename import current_vae_keys
from memo_core.checkpoint.settings import read_vae_settings
from memo_core.encoders.autoencoder import AutoencoderKL
from memo_core.encoders.files import find_speech
from memo_core.encoders.speech import SpeechEncoder
from memo_core.nets.weights import WEIGHTS, load_strict, read_tensors
from memo_core.sampling.schedule import sigmas

LEVELS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
BARE = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False, "act_fn": "gelu"}


@pytest.mark.parametrize("settings", [LEVELS, LEVELS | BARE], ids=["deeper", "bare"])
def test_a_seed_gives_the_weights_that_it_gives_diffusers(settings: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    drawn = []
    for make in (AutoencoderKL, diffusers.AutoencoderKL):
        torch.manual_seed(0)
        drawn.append(make(**settings).state_dict())
    own, theirs = drawn
    assert list(own) == list(theirs) and all(torch.equal(own[name], theirs[name]) for name in own)


def both_vaes(settings: dict[str, Any], weights: dict[str, torch.Tensor] | None = None) -> tuple[Any, Any]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    own, theirs = AutoencoderKL(**settings), diffusers.AutoencoderKL(**settings)
    weights = theirs.state_dict() if weights is None else weights
    for vae in (own, theirs):
        load_strict(vae.eval(), weights, "test")
    return own, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["fixture", "deeper", "bare"])
@torch.no_grad()
def test_vae_computes_the_bits_of_diffusers(
    memo_tiny: Path, kind: str, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    if kind == "fixture":
        folder = memo_tiny / "vae"
        vaes = both_vaes(read_vae_settings(folder / "config.json"), current_vae_keys(read_tensors(folder / WEIGHTS)))
    else:
        vaes = both_vaes(LEVELS | (BARE if kind == "bare" else {}))
    own, theirs = (vae.to(dtype).to(memory_format=layout) for vae in vaes)
    assert list(own.state_dict()) == list(theirs.state_dict())
    side = 2 ** (len(own.config.block_out_channels) - 1)
    for batch, height, width in ((1, 64, 64), (3, 32, 64)):
        pictures = torch.rand(batch, 3, height, width).mul(2).sub(1).to(dtype)
        latents = torch.randn(batch, 4, height // side, width // side).to(dtype)
        means = [vae.encode(pictures, return_dict=False)[0].mean for vae in (own, theirs)]
        frames = [vae.decode(latents, return_dict=False)[0] for vae in (own, theirs)]
        assert torch.equal(*means) and torch.equal(*frames)
        assert torch.equal(own.encode(pictures).latent_dist.mean, means[0])
        assert torch.equal(own.decode(latents).sample, frames[0])


@pytest.mark.parametrize(
    "change",
    [{"down_block_types": ("AttnDownEncoderBlock2D",) * 3}, {"up_block_types": ()}, {"act_fn": "tanh"}],
    ids=lambda change: next(iter(change)),
)
def test_a_vae_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        AutoencoderKL(**(LEVELS | change))


@torch.no_grad()
def test_speech_encoder_computes_the_bits_of_transformers(memo_tiny: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config, _, path = find_speech(memo_tiny / "wav2vec2")
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    theirs = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**(sizes | {"mask_time_prob": 0.0}))).eval()
    weights = read_tensors(path)
    theirs.load_state_dict({name: value for name, value in weights.items() if name != "masked_spec_embed"})
    own = SpeechEncoder.from_pretrained(memo_tiny / "wav2vec2")
    assert list(own.state_dict()) == list(theirs.state_dict())
    waveform = torch.randn(2, 8000)
    frames = theirs.feature_extractor(waveform).shape[-1]  # at its own rate interpolation does nothing
    found, wanted = own(waveform, frames), theirs(waveform, output_hidden_states=True)
    assert torch.equal(found[:, :, -1], wanted.last_hidden_state)


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "step"}, {"num_attention_heads": 5}, {"conv_dim": (16,)}, {"feat_extract_norm": "none"}],
    ids=lambda change: next(iter(change)),
)
def test_a_speech_encoder_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        SpeechEncoder(change)


def test_schedule_has_the_bits_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    for steps in (1, 2, 3, 5, 6, 7, 10, 17, 20, 25, 50, 100, 333, 1000):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        assert sigmas(steps) == scheduler.sigmas.tolist(), steps
