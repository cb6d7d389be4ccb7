"""Options that change how a checkpoint computes: the same numbers, but for weights in 8 bits, which say so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import relative_l2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import networks
from memo_core import AudioTrack, EmotionTrack, MemoPipeline, MemoryState, Reference
from memo_core.budget.counting import module_bytes
from memo_core.checkpoint.load import load
from memo_core.checkpoint.networks import Networks
from memo_core.errors import CheckpointError, MemoryStateError
from memo_core.nets.layers import FusedLinear
from memo_core.running.fp8 import keep_in_fp8
from memo_core.running.options import Options, compile_blocks, optimise, repeated_blocks
from memo_core.sampling.settings import PRESETS

ROUNDING = 1e-5  # relative L2
FP8_ERROR = 0.2  # all layers of the fixture's random weights: 0.15 of a velocity, 0.12 of a window's latents

Sample = Callable[[Networks], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def sample(reference: Reference, track: AudioTrack, emotions: EmotionTrack) -> Sample:
    """Networks -> the first velocity, latents and frames of a window."""

    def run(nets: Networks) -> tuple[Tensor, Tensor, Tensor]:
        pipe, velocities = MemoPipeline(nets), []
        hook = nets.diffusion_net.register_forward_hook(lambda net, given, velocity: velocities.append(velocity))
        clip, _ = pipe.sample_clip(reference, track, emotions, num_frames=16, steps=2)
        hook.remove()
        return velocities[0], clip.latents, pipe.decode(clip.latents[:, :1])

    return run


@pytest.fixture(scope="module")
def plain(pipe: MemoPipeline, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    return sample(exact(pipe))


def exact(pipe: MemoPipeline) -> Networks:
    """A copy of the small checkpoint, nothing done to it."""
    nets = copy.deepcopy(pipe.nets)
    nets.options = None
    return nets


def optimised(pipe: MemoPipeline, **options: bool) -> Networks:
    nets = exact(pipe)
    optimise(nets, Options(**options))
    return nets


def parameters(nets: Networks) -> int:
    return sum(p.numel() for net in (nets.diffusion_net, nets.reference_net) for p in net.parameters())


# --- The same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(channels_last=True), dict(fuse_qkv=True)], ids=str)
def test_layout_and_fusing_change_rounding_alone(
    pipe: MemoPipeline, sample: Sample, plain: tuple[Tensor, Tensor, Tensor], options: dict[str, bool]
) -> None:
    nets = optimised(pipe, **options)
    for mine, wanted in zip(sample(nets), plain):
        assert relative_l2(mine, wanted) < ROUNDING
    assert nets.digest == pipe.nets.base_digest  # stored windows and memory states are found again
    assert parameters(nets) == parameters(pipe.nets)  # no weight is kept twice


def test_channels_last_is_the_layout_of_every_convolution(pipe: MemoPipeline) -> None:
    nets = optimised(pipe, channels_last=True)
    for net in (nets.diffusion_net, nets.reference_net, nets.vae):
        weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
        assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_all_that_reads_the_same_tokens_is_fused(pipe: MemoPipeline) -> None:
    nets = optimised(pipe, fuse_qkv=True)
    for net in (nets.diffusion_net, nets.reference_net):
        names = [name.rpartition(".")[2] for name, module in net.named_modules() if type(module) is nn.Linear]
        assert not {"to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"} & set(names)
        assert any(isinstance(module, FusedLinear) for module in net.modules())


def test_by_default_the_layers_have_their_released_names(memo_tiny: Path, pipe: MemoPipeline) -> None:
    untouched = load(memo_tiny)
    assert untouched.options is None and pipe.nets.options is not None
    for name in ("diffusion_net", "reference_net"):
        assert getattr(pipe.nets, name).state_dict().keys() == getattr(untouched, name).state_dict().keys()


@pytest.mark.slow
def test_compiled_blocks_are_whole_graphs_which_blocks_of_one_shape_share() -> None:
    """With all other options. Traced, but no code is generated: a graph break would be an error."""
    nets = networks.tiny()
    optimise(nets, Options(fuse_qkv=True, channels_last=True))
    for net in (nets.diffusion_net, nets.reference_net):
        keep_in_fp8(net, least=1)
    pipe = MemoPipeline(nets)
    job = networks.clip(pipe, 64, 2, steps=2)
    wanted = [window.latents for window in pipe.sample_windows(job)]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_blocks(nets, backend)
    try:
        windows = MemoPipeline(nets).sample_windows(job)
        first = next(windows)
        after_one = len(graphs)
        second = next(windows)
    finally:
        torch._dynamo.reset()
    assert relative_l2(first.latents, wanted[0]) < ROUNDING and relative_l2(second.latents, wanted[1]) < ROUNDING
    blocks = list(repeated_blocks(nets))
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert 0 < after_one < 0.7 * len(blocks)
    assert len(graphs) == after_one  # warm-up ends with the first window


# --- Weights in 8 bits ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(pipe: MemoPipeline) -> Networks:
    """All of the small checkpoint's layers in fp8: at its size the option itself leaves most as they are."""
    nets = optimised(pipe, fp8_weights=True)
    for net in (nets.diffusion_net, nets.reference_net):
        keep_in_fp8(net, least=1)
    return nets


def test_fp8_keeps_a_weight_in_a_byte(pipe: MemoPipeline, rounded: Networks) -> None:
    for name in ("diffusion_net", "reference_net"):
        kept = module_bytes(getattr(rounded, name))
        assert kept < 0.3 * module_bytes(getattr(pipe.nets, name))  # of float32; scales, biases and norms besides
    assert rounded.diffusion_net.conv_in.weight.dtype == torch.float32


def test_fp8_error_is_as_stated(rounded: Networks, sample: Sample, plain: tuple[Tensor, Tensor, Tensor]) -> None:
    for mine, wanted in zip(sample(rounded), plain):
        assert 1e-3 < relative_l2(mine, wanted) < FP8_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_rounds_a_weight_by_a_sixteenth_at_most(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] *= 1e-4  # every channel has a scale of its own
    weight[1] = 0
    net = nn.Sequential(nn.Conv2d(32, 64, 3, bias=False, dtype=dtype)).requires_grad_(False)
    net[0].weight.copy_(weight)
    keep_in_fp8(net, least=1)
    assert net[0].weight.dtype == dtype and net[0].kept.itemsize == 1
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    # Half a step of 3 bits of mantissa, and below the smallest exponent half of the smallest step.
    allowed = torch.maximum(weight.abs() / 16, largest * 2**-10 / 448) * 1.01
    assert ((net[0].weight - weight).abs() <= allowed).all() and (net[0].weight[1] == 0).all()


def test_a_model_in_fp8_is_another_model(
    pipe: MemoPipeline, reference: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    nets = optimised(pipe, fp8_weights=True)
    assert nets.digest not in (pipe.nets.digest, nets.base_digest) and nets.base_digest == pipe.nets.base_digest
    assert "fp8" in nets.title and "fp8" not in pipe.nets.title
    past = torch.zeros(16, 4, 16, 16)
    exact_memory = MemoryState.empty().push(past, reference.face_embedding, pipe.nets.digest, reference.digest)
    with pytest.raises(MemoryStateError, match=nets.digest):
        MemoPipeline(nets).sample_clip(reference, track, emotions, exact_memory, num_frames=16, steps=1)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_options_that_cannot_be_are_refused_before_anything_changes(pipe: MemoPipeline) -> None:
    nets = exact(pipe)
    with pytest.raises(CheckpointError, match="cuda_graphs needs a CUDA device, the networks are on cpu"):
        optimise(nets, Options(cuda_graphs=True, fuse_qkv=True))
    assert nets.options is None and parameters(nets) == parameters(pipe.nets)
    assert nets.diffusion_net.state_dict().keys() == pipe.nets.diffusion_net.state_dict().keys()
    optimise(nets, Options())
    with pytest.raises(CheckpointError, match="already have options"):
        optimise(nets, Options(fp8_weights=True))


def test_a_hosts_layers_stay_as_they_are(memo_tiny: Path) -> None:
    kinds = ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding")
    ops = SimpleNamespace(**{kind: type(kind, (getattr(nn, kind),), {}) for kind in kinds})
    nets = load(memo_tiny, ops=ops, options=Options())
    assert nets.options == Options(channels_last=False, fuse_qkv=False)
    nets.options = None
    with pytest.raises(CheckpointError, match="channels_last, compile, fp8_weights: not with a host's own layers"):
        optimise(nets, Options(channels_last=True, compile=True, fp8_weights=True))


# --- The step loop ----------------------------------------------------------------------------------------------------


class Questions(TorchDispatchMode):
    """Counts operators that make the host wait for the device: those that read values out of tensors."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("speed", PRESETS)
def test_between_first_and_last_step_nothing_is_asked_of_the_device(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack, speed: str
) -> None:
    job = pipe.job(small, track, emotions, num_frames=16, steps=3, speed=speed)
    questions, inside = Questions(), ExitStack()

    def on_progress(done: int, total: int) -> None:
        if done == 1:
            inside.enter_context(questions)
            bool(torch.ones(1) > 0)  # noticed
        elif done == total:
            inside.close()

    list(pipe.sample_windows(job, on_progress=on_progress))
    assert len(questions.asked) == 1
