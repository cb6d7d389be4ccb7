"""Training starts from Stable Diffusion's UNet and AnimateDiff's motion module, read as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import FIXTURES
from diffusers import MotionAdapter, UNet2DConditionModel
from torch import Tensor, nn

from memo_core.errors import CheckpointError
from memo_core.nets.conditions import Conditions
from memo_core.nets.config import NetConfig
from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.reference_net import ReferenceNet
from training.initialise import copy_spatial, copy_temporal, from_animatediff, from_stable_diffusion

TINY = NetConfig(
    block_out_channels=(16, 16, 32, 32),
    layers_per_block=1,
    heads=2,
    cross_attention_dim=16,
    norm_num_groups=8,
    audio_attention_dim=16,
    memory_heads=2,
)


class Networks(nn.Module):
    def __init__(self, config: NetConfig):
        super().__init__()
        self.reference_net, self.diffusion_net = ReferenceNet(config), DiffusionNet(config)


@pytest.fixture
def nets() -> Networks:
    torch.manual_seed(0)
    return Networks(TINY)


def unet(**settings) -> UNet2DConditionModel:
    torch.manual_seed(1)
    sizes = {"block_out_channels": TINY.block_out_channels, "layers_per_block": 1, "attention_head_dim": 2}
    sizes |= {"cross_attention_dim": 16, "norm_num_groups": 8}
    return UNet2DConditionModel(**(sizes | settings)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model's folder with its UNet, as diffusers lays it out."""
    unet().save_pretrained(tmp_path / "sd" / "unet")
    return tmp_path / "sd"


@torch.no_grad()
def test_reference_net_computes_what_stable_diffusion_does(nets: Networks, saved: Path) -> None:
    from_stable_diffusion(nets, saved)
    theirs: list[Tensor] = []
    original = UNet2DConditionModel.from_pretrained(saved, subfolder="unet").eval()
    levels = [*original.down_blocks, original.mid_block, *original.up_blocks]
    for block in levels:
        for transformer in getattr(block, "attentions", []):
            norm = transformer.transformer_blocks[0].norm1
            norm.register_forward_hook(lambda _module, _input, output: theirs.append(output))
    latents, tokens = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16)
    original(latents, 0, tokens)
    # One layer per level on the way down, one in the middle, two on the way up; the coarsest level has no attention.
    wanted = [True, True, True, False, True, False, False, True, True, True, True, True, True]
    ours = [feature for feature, flag in zip(nets.reference_net(latents, tokens), wanted) if flag]
    assert len(ours) == len(theirs) == 10
    for mine, its in zip(ours, theirs):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_diffusion_net_begins_as_stable_diffusion_with_silent_modules(nets: Networks, saved: Path) -> None:
    """Without a reference, every frame of a window is what Stable Diffusion makes of it, sound and memory or not."""
    from_stable_diffusion(nets, saved / "unet")
    original = UNet2DConditionModel.from_pretrained(saved, subfolder="unet").eval()
    frames, tokens = torch.randn(1, 4, 3, 16, 16), torch.randn(1, 4, 16)
    ours = nets.diffusion_net.predict(
        frames,
        torch.tensor([300.0]),
        Conditions(
            reference=[torch.empty(0, 1, b.resnets[i].conv1.out_channels) for b, i, _ in nets.diffusion_net.layers()],
            face_tokens=tokens,
            audio_tokens=torch.randn(1, 3, 5, 16),
            emotion=torch.tensor([3]),
            frames=3,
        ),
        None,
    )
    theirs = original(frames[0].transpose(0, 1), 300, tokens.expand(3, -1, -1)).sample
    torch.testing.assert_close(ours[0].transpose(0, 1), theirs, rtol=1e-4, atol=1e-4)


def test_report_says_what_became_of_every_weight(nets: Networks, saved: Path) -> None:
    report = from_stable_diffusion(nets, saved)
    own = {f"{net}.{name}" for net in ("reference_net", "diffusion_net") for name in getattr(nets, net).state_dict()}
    assert set(report.copied) | set(report.new) == own and not set(report.copied) & set(report.new)
    assert all(".audio_modules." in name or ".motion_modules." in name for name in report.new)
    assert not report.unused and not report.unfitting  # the Diffusion Net takes all of the UNet
    assert sum(report.copied.values()) + sum(report.new.values()) == sum(p.numel() for p in nets.parameters())
    assert "audio_modules" in str(report) and "copied" in str(report)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cross_attention_dim": 24}, "attn2.to_k.weight"),  # as Stable Diffusion 2's
        ({"in_channels": 9}, r"conv_in.weight \(16, 4, 3, 3\), found \(16, 9, 3, 3\)"),  # the inpainting model
        ({"layers_per_block": 2}, "layers_per_block is 2"),
        ({"attention_head_dim": 4}, "heads is 4"),
        ({"use_linear_projection": True}, "use_linear_projection"),
    ],
    ids=["other text", "inpainting", "deeper", "other heads", "linear projection"],
)
def test_another_unet_is_refused_and_nothing_changes(nets: Networks, tmp_path: Path, settings, message) -> None:
    unet(**settings).save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        from_stable_diffusion(nets, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in nets.state_dict().items())


def test_torch_file_is_read_and_an_absent_one_named(nets: Networks, saved: Path) -> None:
    file = saved / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    with pytest.raises(CheckpointError, match="none of diffusion_pytorch_model.safetensors"):
        from_stable_diffusion(nets, saved)
    torch.save(unet().state_dict(), file.with_suffix(".bin"))
    assert from_stable_diffusion(nets, saved).copied


def test_released_networks_take_every_spatial_weight_of_stable_diffusion() -> None:
    """At full size, without memory: every key of the released networks is accounted for."""
    with torch.device("meta"):
        nets = Networks(NetConfig())
        original = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).state_dict()
    report = copy_spatial(nets, original)
    released = json.loads((FIXTURES / "release_keys.json").read_text())
    keys = {f"{net}.{name}" for net, shapes in released.items() for name in shapes}
    assert set(report.copied) | set(report.new) == keys
    spatial = {name for name in keys if ".audio_modules." not in name and ".motion_modules." not in name}
    assert set(report.copied) == spatial and not report.unused
    assert len(report.copied) == 662 + 686
    assert all(name in report.silent for name in report.new if ".proj_out." in name)


def animatediff(middle: bool, prefix: str = "") -> dict[str, Tensor]:
    """A motion module in the naming of AnimateDiff's own files, at the tiny nets' size."""
    places = [(f"down_blocks.{i}", 1, width) for i, width in enumerate(TINY.block_out_channels)]
    places += [(f"up_blocks.{i}", 2, width) for i, width in enumerate(TINY.block_out_channels[::-1])]
    places += [("mid_block", 1, TINY.block_out_channels[-1])] if middle else []
    weights: dict[str, Tensor] = {}
    for place, count, dim in places:
        for i in range(count):
            module = f"{prefix}{place}.motion_modules.{i}.temporal_transformer."
            block = f"{module}transformer_blocks.0."
            shapes = {f"{module}norm.weight": (dim,), f"{module}norm.bias": (dim,)}
            for name in ("proj_in", "proj_out"):
                shapes |= {f"{module}{name}.weight": (dim, dim), f"{module}{name}.bias": (dim,)}
            for j in range(2):
                attention = f"{block}attention_blocks.{j}."
                shapes |= {f"{attention}{name}.weight": (dim, dim) for name in ("to_q", "to_k", "to_v", "to_out.0")}
                shapes |= {f"{attention}to_out.0.bias": (dim,), f"{attention}pos_encoder.pe": (1, 32, dim)}
                shapes |= {f"{block}norms.{j}.weight": (dim,), f"{block}norms.{j}.bias": (dim,)}
            shapes |= {f"{block}ff.net.0.proj.weight": (8 * dim, dim), f"{block}ff.net.0.proj.bias": (8 * dim,)}
            shapes |= {f"{block}ff.net.2.weight": (dim, 4 * dim), f"{block}ff.net.2.bias": (dim,)}
            shapes |= {f"{block}ff_norm.weight": (dim,), f"{block}ff_norm.bias": (dim,)}
            weights |= {name: torch.randn(shape) for name, shape in shapes.items()}
    return weights


@pytest.mark.parametrize("version", [2, 3])
def test_memory_modules_begin_as_animatediffs(nets: Networks, tmp_path: Path, version: int) -> None:
    """Version 2 is a bare dictionary; version 3 has no middle block and nests under state_dict."""
    weights = animatediff(middle=version == 2, prefix="" if version == 2 else "module.")
    torch.save(weights if version == 2 else {"state_dict": weights, "epoch": 1}, tmp_path / "mm.ckpt")
    spatial = {k: v.clone() for k, v in nets.state_dict().items() if ".motion_modules." not in k}
    report = from_animatediff(nets, tmp_path / "mm.ckpt")
    state = nets.diffusion_net.state_dict()
    memory = {f"diffusion_net.{name}" for name in state if ".motion_modules." in name}
    assert set(report.copied) | set(report.new) == memory
    assert {name.split(".")[1] for name in report.new} == (set() if version == 2 else {"mid_block"})
    assert report.unused and all(name.endswith("pos_encoder.pe") for name in report.unused)
    assert ("the memory of mid_block begins random" in str(report)) == (version == 3)
    assert ("mm_sd_v15_v2.ckpt, has one" in str(report)) == (version == 3)
    name = "up_blocks.2.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q.weight"
    prefix = "" if version == 2 else "module."
    assert torch.equal(state[name], weights[prefix + name])
    after = nets.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in spatial.items())


def test_motion_adapter_of_diffusers_is_the_same_module_renamed(nets: Networks, tmp_path: Path) -> None:
    torch.manual_seed(2)
    adapter = MotionAdapter(
        block_out_channels=TINY.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    adapter.save_pretrained(tmp_path)
    report = from_animatediff(nets, tmp_path)
    assert not report.new and not report.unfitting
    assert all(name.endswith("pos_embed.pe") for name in report.unused)
    theirs = adapter.mid_block.motion_modules[0].transformer_blocks[0]
    ours = nets.diffusion_net.mid_block.motion_modules[0].temporal_transformer.transformer_blocks[0]
    assert torch.equal(ours.attention_blocks[1].to_v.weight, theirs.attn2.to_v.weight)
    assert torch.equal(ours.norms[0].bias, theirs.norm1.bias)
    assert torch.equal(ours.ff_norm.weight, theirs.norm3.weight)


def test_what_does_not_fit_stays_and_a_stranger_is_refused(nets: Networks, tmp_path: Path) -> None:
    weights = animatediff(middle=True)
    odd = "mid_block.motion_modules.0.temporal_transformer.proj_in.weight"
    weights[odd] = torch.zeros(5, 5)
    kept = nets.diffusion_net.state_dict()[odd].clone()
    report = copy_temporal(nets, weights)
    assert list(report.unfitting) == [f"diffusion_net.{odd}"]
    assert torch.equal(nets.diffusion_net.state_dict()[odd], kept)
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="no temporal module that fits.*'a.weight'"):
        from_animatediff(nets, tmp_path / "other.ckpt")
    torch.save(SimpleNamespace(code=1), tmp_path / "objects.ckpt")
    with pytest.raises(CheckpointError, match="never run"):
        from_animatediff(nets, tmp_path / "objects.ckpt")
