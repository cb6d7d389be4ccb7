"""What a stage costs is counted from the step itself: operations, memory, storage."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from training import budget, presets
from training.config import Data, Lora, Optimizer
from training.nets import Nets, Sizes, checkpoint_gradients
from training.objectives.flow import FlowModel
from training.shards import ShardWriter

LEVELS = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock", "DownBlock"],
    "up_block_types": ["UpBlock", "CrossAttnUpBlock"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
    "in_channels": 4,
    "out_channels": 4,
}
TINY = Sizes(
    reference_net=LEVELS,
    diffusion_net=LEVELS
    | {"audio_attention_dim": 16, "motion_module_kwargs": {"num_attention_heads": 2}, "motion_module_resolutions": [1]},
    audio_tokens=4,
    audio_hidden=32,
    speech_layers=2,
    speech_dim=8,
)
STAGE = replace(
    presets.memo_stage3(),
    data=Data(past_windows=(1,)),
    engine=replace(presets.memo_stage3().engine, mixed_precision="no"),
)


@pytest.fixture(scope="module")
def one() -> budget.Cost:
    return budget.count(STAGE, TINY, size=64)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 512, bias=False), nn.Linear(512, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(x)))


def test_operations_of_a_linear_layer_are_those_of_its_formula() -> None:
    layer, x = nn.Linear(20, 30, bias=False), torch.ones(7, 20, requires_grad=True)
    step = budget.measure(layer, lambda: layer(x).sum())
    assert step.forward == 2 * 7 * 20 * 30
    assert step.backward == 2 * step.forward  # one product for the weight's gradient, one for the input's
    assert step.weights == step.gradients == step.peak_gradients == 4 * 20 * 30


def test_attention_in_mixed_precision_is_counted_as_fused() -> None:
    """Two products of N x N x D per head, and in the backward pass five; no N x N matrix is ever held."""
    query = nn.Parameter(torch.zeros(1, 2, 256, 8))
    holder = nn.ParameterList([query])
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        holder = nn.ParameterList([nn.Parameter(torch.zeros(1, 2, 256, 8))])
        query = holder[0]
        step = budget.measure(
            holder, lambda: F.scaled_dot_product_attention(query, query, query).float().sum(), torch.bfloat16
        )
    assert step.forward == 2 * 2 * 256 * 256 * 8 * 2
    assert step.backward == step.forward * 5 // 2
    assert step.peak < 2 * 256 * 256 * 2


def test_recomputing_costs_a_forward_pass_and_saves_memory() -> None:
    torch.manual_seed(0)
    x = torch.ones(100, 8, requires_grad=True)

    def step_of(recompute: bool) -> budget.Step:
        blocks = nn.ModuleList(Perceptron() for _ in range(6))

        def run() -> Tensor:
            y = x
            for block in blocks:
                y = checkpoint(block, y, use_reentrant=False) if recompute else block(y)
            return y.sum()

        return budget.measure(blocks, run)

    plain, recomputed = step_of(False), step_of(True)
    assert recomputed.forward == plain.forward
    # Of the last product of a block only the inputs are needed again, so it is not computed twice.
    assert plain.backward + plain.forward // 2 <= recomputed.backward <= plain.backward + plain.forward
    one_block = 2 * 4 * 100 * 512  # what GELU and the second layer keep
    assert plain.saved >= 6 * one_block > plain.peak // 2
    assert recomputed.saved < one_block / 2 and recomputed.peak < 3 * one_block


def model_of(stage, recompute: bool) -> FlowModel:
    nets = Nets(TINY)
    for part, parameters in nets.parts().items():
        for parameter in parameters:
            parameter.requires_grad_(part in stage.train)
    if recompute:
        checkpoint_gradients(nets)
    return FlowModel(nets, stage.loss)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_memory_of_the_real_step_is_what_its_allocator_says(recompute: bool) -> None:
    """Counted without data, and as the profiler saw the CPU's allocator serve the same step with data."""
    stage = replace(STAGE, engine=replace(STAGE.engine, gradient_checkpointing=recompute, attention="math"))
    counted = budget.count(stage, TINY, size=64).step
    model, batch = model_of(stage, recompute), budget.example(stage, TINY, size=64)
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
        torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]),
    ):
        model(batch)[0].mean().backward()
    now = peak = 0
    for event in sorted(_allocations(seen), key=lambda e: e[0]):
        now += event[1]
        peak = max(peak, now)
    assert counted.peak == pytest.approx(peak, rel=0.05)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert counted.gradients == gradients


def _allocations(seen: profile) -> list[tuple[int, int]]:
    """(time, bytes) of every allocation, and of every release as a negative number."""
    return [
        (event.start_ns(), event.nbytes())
        for event in seen.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]


def test_adapters_and_small_moments_make_training_cheap(one: budget.Cost) -> None:
    pytest.importorskip("peft")
    few = budget.count(replace(STAGE, lora=Lora(rank=2), optimizer=Optimizer(bits=8)), TINY, size=64)
    assert few.learning < one.learning / 5
    assert few.average == 0 and one.average == 4 * one.learning
    assert few.moments <= 8 * few.learning and one.moments == 8 * one.learning
    mixed = replace(STAGE, lora=Lora(rank=2, base="bf16"), engine=presets.memo_lora().engine)
    halved = budget.count(mixed, TINY, size=64)
    frozen = few.step.weights - few.step.gradients
    assert halved.step.weights == few.step.gradients + frozen // 2


def test_eight_bit_moments_take_two_bytes_and_their_scales() -> None:
    assert budget.moments(1 << 20, 32) == 8 << 20
    assert budget.moments(1 << 20, 8) == (2 << 20) + 2 * 4 * (1 << 12)
    assert budget.moments(1000, 8) == 8000


def test_a_batch_costs_as_many_operations_as_its_samples(one: budget.Cost) -> None:
    three = budget.count(replace(STAGE, optimizer=Optimizer(batch=3)), TINY, size=64)
    # All but the Reference Net's time embedding, which all share.
    assert three.operations == pytest.approx(3 * one.operations, rel=1e-3)
    assert 2 * one.step.peak < three.step.peak < 3.2 * one.step.peak
    accumulated = replace(one, stage=replace(STAGE, optimizer=Optimizer(accumulate=3)))
    assert accumulated.operations == 3 * one.operations
    assert accumulated.total == one.total + one.step.gradients - one.step.peak_gradients
    assert one.hours(1e12, 0.5) == pytest.approx(one.operations * STAGE.steps / 0.5e12 / 3600)


def test_storage_is_what_shards_take(tmp_path) -> None:
    seconds, side = 10, 8
    frames = seconds * budget.FPS
    half = torch.float16
    with ShardWriter(tmp_path) as shards:
        for i in range(3):
            tensors = {
                "latents": torch.zeros(frames, 4, side, side, dtype=half),
                "portrait": torch.zeros(4, side, side, dtype=half),
                "speech": torch.zeros(frames, 2, 8, dtype=half),
                "emotion": torch.zeros(frames, dtype=torch.uint8),
                "face_embedding": torch.zeros(512),
                "focus": torch.zeros(side, side, dtype=half),
            }
            shards.add(f"clip{i}", tensors, {"source": "a.mp4"})
    written = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    expected = budget.storage(3 * seconds / 3600, size=8 * side, sizes=TINY, clip_seconds=seconds)
    assert expected == pytest.approx(written, rel=0.05)


def test_command_prints_a_table(one: budget.Cost, capsys, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        budget, "count", lambda config, _, size: asked.append((config, size)) or replace(one, stage=config)
    )
    parser = argparse.ArgumentParser()
    budget.add_command(parser.add_subparsers())
    args = parser.parse_args(["budget", "memo_stage1", "memo_lora", "--size", "256", "--batch", "2", "--both"])
    args.run(args)
    assert [(config.name, config.engine.gradient_checkpointing) for config, _ in asked] == [
        ("stage1", True),
        ("stage1", False),
        ("lora", True),
        ("lora", False),
    ]
    assert all(size == 256 and config.optimizer.batch == 2 for config, size in asked)
    printed = capsys.readouterr().out
    for word in ("stage1", "lora", "GPU hours, RTX 4090", "all in all", "2 x 1", "100 h of video"):
        assert word in printed
    with pytest.raises(SystemExit, match="no preset 'memo_stage9'"):
        args = parser.parse_args(["budget", "memo_stage9"])
        args.run(args)
    args = parser.parse_args(["budget", "toon_stage1"])
    args.run(args)
    assert asked[-1][1] == 128


def test_many_processes_hold_all_gradients_and_eight_bits_a_quarter_of_the_moments(one: budget.Cost) -> None:
    more = one.total_of_many - one.total
    assert more == max(one.step.peak - one.step.peak_gradients, 0) + one.step.gradients - max(
        one.step.peak, one.step.gradients
    )
    assert one.small_moments == sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in _sizes_of_what_learns())


def _sizes_of_what_learns() -> list[int]:
    parts = Nets(TINY).parts()
    return [parameter.numel() for name in STAGE.train for parameter in parts[name]]


def test_encoding_is_counted_as_the_real_encoder_runs() -> None:
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    from training.toon.sizes import VAE

    vae = AutoencoderKL.from_config(VAE)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]),
    ):
        vae.encode(torch.zeros(1, 3, 64, 64))
    assert budget.encoding(64, VAE) == counter.get_total_flops() > 0
    said = budget.preparation(2, 64, VAE, share=0.5)
    hours = 2 * 3600 * 30 * counter.get_total_flops() / (312e12 * 0.5) / 3600
    assert (
        f"0.2 M pictures of {counter.get_total_flops() / 1e12:.3g} TFLOP" in said and f"A100 80 GB {hours:,.0f}" in said
    )
