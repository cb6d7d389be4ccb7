"""Which parts work in float32 in half precision: those that `precision` names, in a host's layer classes, too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import relative_l2, thinned
from safetensors.torch import load_file
from torch import Tensor, nn

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, Reference
from memo_core.budget.counting import needs
from memo_core.budget.report import released as released_networks
from memo_core.checkpoint.load import load
from memo_core.memory.cache import MemoryCache
from memo_core.nets.conditions import Conditions
from memo_core.nets.layers import in_full, narrowed, widened
from memo_core.running import precision
from memo_core.sampling.conditions import Conditioner
from memo_core.sampling.settings import Settings

HALVES = [torch.bfloat16, torch.float16]


def _with_cast(kind: type[nn.Module]) -> type[nn.Module]:
    """A layer that brings its weights to its input's format, as ComfyUI's `manual_cast` does."""

    class Casting(kind):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self, nn.Embedding):
                return super().forward(x)
            weights = {name: weight.to(x.dtype) for name, weight in self.named_parameters()}
            return torch.func.functional_call(_plain(self, kind), weights, (x,))

    return Casting


def _plain(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    plain = kind.__new__(kind)
    plain.__dict__ = dict(layer.__dict__)
    return plain


HOST = SimpleNamespace(
    **{name: _with_cast(getattr(nn, name)) for name in ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding")}
)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_decoder_alone_keeps_its_weights_whole(memo_tiny: Path, dtype: torch.dtype) -> None:
    nets = load(memo_tiny, dtype=dtype)
    saved = load_file(memo_tiny / "vae" / "diffusion_pytorch_model.safetensors")
    for name, weight in nets.vae.named_parameters():
        whole = name.startswith(("decoder.", "post_quant_conv."))
        assert weight.dtype == (torch.float32 if whole else dtype)
        assert not whole or torch.equal(weight, saved[name].float()) or name not in saved
    others = (nets.reference_net, nets.diffusion_net, nets.image_proj, nets.audio_proj)
    assert {weight.dtype for net in others for weight in net.parameters()} == {dtype}


def test_in_float32_nothing_is_converted() -> None:
    norm, x = nn.GroupNorm(2, 4), torch.randn(1, 4, 2, 2)
    assert narrowed(x, norm) is x and widened(x, x, norm) is x
    coarse = x.bfloat16()  # under autocast: a coarser x is left to it
    assert narrowed(coarse, norm) is coarse and widened(coarse, coarse, norm) is coarse
    assert precision.carried(torch.float32) == torch.float32 and precision.carried(torch.float64) == torch.float64


def test_a_layer_in_full_computes_with_what_its_weights_are() -> None:
    norm, conv = nn.GroupNorm(2, 4).bfloat16(), nn.Conv2d(4, 3, 3).bfloat16()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(in_full(norm, x), F.group_norm(x, 2, norm.weight.float(), norm.bias.float()))
    assert torch.equal(in_full(conv, x), F.conv2d(x, conv.weight.float(), conv.bias.float()))
    assert conv.weight.dtype == torch.bfloat16 and in_full(conv, x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", thinned(HALVES, fast=[torch.bfloat16]), ids=str)
def test_a_hosts_layers_give_the_same_bits(
    memo_tiny: Path, small: Reference, track: AudioTrack, emotions: EmotionTrack, dtype: torch.dtype
) -> None:
    """Its weights stay in half precision, and are brought to the format of what each layer reads."""

    def latents(**how: object) -> Tensor:
        pipe = MemoPipeline(load(memo_tiny, dtype=dtype, **how))
        return pipe.sample_clip(small, track, emotions, num_frames=32, steps=2)[0].latents

    assert torch.equal(latents(ops=HOST), latents())


def test_stored_windows_are_found_again_in_the_formats_whose_numbers_stayed(
    pipe: MemoPipeline, reference: Reference, memo_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = MemoPipeline.from_pretrained(memo_tiny, dtype=torch.bfloat16)

    def addresses() -> list[str]:
        return [Conditioner(each.nets, reference, Settings(), MemoryCache()).address for each in (pipe, half)]

    before = addresses()
    monkeypatch.setattr(precision, "VERSION", precision.VERSION + 1)
    after = addresses()
    assert after[0] == before[0] and after[1] != before[1]
    assert "|torch.float32|" in before[0]


@pytest.mark.slow
def test_the_budget_counts_what_is_carried_and_decoded(memo_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [load(memo_tiny, dtype=torch.bfloat16) for _ in range(2)]
    counted = needs(nets[0], 128, 128, Settings())
    monkeypatch.setattr(precision, "carried", lambda dtype: dtype)
    nets[1].vae.decoder.bfloat16()
    nets[1].vae.post_quant_conv.bfloat16()
    plain = needs(nets[1], 128, 128, Settings())
    assert counted.decoding > 1.2 * plain.decoding and counted.others > plain.others
    assert 1 < counted.step / plain.step < 2 and counted.encoding == plain.encoding
    released = released_networks()
    assert released.vae.decoder.conv_in.weight.dtype == torch.float32
    assert released.vae.encoder.conv_in.weight.dtype == released.diffusion_net.conv_in.weight.dtype == torch.bfloat16


def test_half_precision_carries_hidden_states_in_float32(memo_tiny: Path, pipe: MemoPipeline) -> None:
    """Latents in float32 are enough to say so; the answer has their format, and is nearer to that of float32."""
    half = load(memo_tiny, dtype=torch.bfloat16).diffusion_net
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in half.named_modules():
        if name.endswith(("resnets.0", "motion_modules.0", "attentions.0", "audio_modules.0")):
            module.register_forward_hook(
                lambda module, given, answer, name=name: seen.setdefault(name, set()).add(
                    (answer[0] if isinstance(answer, tuple) else answer).dtype
                )
            )
    torch.manual_seed(0)
    config = half.config
    tokens = {
        "face_tokens": torch.randn(1, 4, config.cross_attention_dim),
        "audio_tokens": torch.randn(1, 16, 8, config.audio_attention_dim),
    }
    portrait = pipe.nets.reference_net(torch.randn(1, 4, 16, 16), tokens["face_tokens"])
    latents, emotion = torch.randn(1, 4, 16, 16, 16), torch.tensor([3])

    def velocity(net: nn.Module, dtype: torch.dtype, latents: Tensor) -> Tensor:
        given = {name: value.to(dtype) for name, value in tokens.items()}
        reference = [feature.to(dtype) for feature in portrait]
        conditions = net.prepare(Conditions(reference=reference, emotion=emotion, frames=16, **given))
        return net(latents, net.time_shifts(torch.tensor([500.0]), dtype), conditions, None)

    with torch.no_grad():
        wanted = velocity(pipe.nets.diffusion_net, torch.float32, latents)
        plain = velocity(half, torch.bfloat16, latents.bfloat16())
        assert {dtype for dtypes in seen.values() for dtype in dtypes} == {torch.bfloat16}
        seen.clear()
        carried = velocity(half, torch.bfloat16, latents)
    assert plain.dtype == torch.bfloat16 and carried.dtype == torch.float32
    assert seen and {dtype for dtypes in seen.values() for dtype in dtypes} == {torch.float32}
    assert relative_l2(carried, wanted) < 0.95 * relative_l2(plain, wanted)
