"""Parts that join later: until then they take no gradients, and afterwards the run is the one that it always was."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_training as runs
import torch
from small_training import TINY, launch, log_of, small_nets
from test_training import assert_same_state, weights_of

from memo_core.nets.diffusion_net import DiffusionNet
from memo_core.nets.layers import ResnetBlock
from memo_core.nets.memory_module import MemoryModule
from memo_core.nets.multimodal import AudioModule
from memo_core.nets.spatial import SpatialTransformer
from training import batches, engine
from training.config import ConfigError, Loss
from training.objectives import flow

data, mesh = runs.data, runs.mesh
JOIN = ("reference", "spatial", "backbone", "face")
STAGE = replace(TINY, steps=4, join=JOIN, join_step=2)


@pytest.mark.parametrize(("accumulate", "again"), [(1, False), (2, True)], ids=["plain", "in parts, recomputed"])
def test_to_wait_without_gradients_is_to_wait_with_gradients_thrown_away(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, again: bool
) -> None:
    stage = replace(STAGE, optimizer=replace(STAGE.optimizer, batch=1, accumulate=accumulate))
    stage = replace(stage, engine=replace(stage.engine, gradient_checkpointing=again))
    waited = engine.train(stage, data, tmp_path / "waited", small_nets(), None)
    descend = engine.Trainer._descend

    def masked(trainer: engine.Trainer, scale: float) -> float:
        for name, group in zip(trainer.names, trainer.optimizer.param_groups):
            if name in JOIN and trainer.step < stage.join_step:
                for parameter in group["params"]:
                    parameter.grad = None
        return descend(trainer, scale)

    monkeypatch.setattr(engine.Trainer, "_hold_back", lambda *_: False)
    monkeypatch.setattr(engine.Trainer, "_descend", masked)
    thrown_away = engine.train(stage, data, tmp_path / "thrown away", small_nets(), None)
    assert_same_state(waited, thrown_away)
    figures = [[(row["loss"], row["gradient_norm"]) for row in log_of(path.parent)] for path in (waited, thrown_away)]
    assert figures[0] == figures[1]


def test_who_waits_takes_no_gradients(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking, descend = [], engine.Trainer._descend

    def watched(trainer: engine.Trainer, scale: float) -> float:
        groups = zip(trainer.names, trainer.optimizer.param_groups)
        taking.append({name for name, group in groups if any(p.grad is not None for p in group["params"])})
        return descend(trainer, scale)

    monkeypatch.setattr(engine.Trainer, "_descend", watched)
    engine.train(STAGE, data, tmp_path, small_nets(), None)
    assert taking == [{"audio", "memory"}] * 2 + [set(STAGE.train)] * 2


@pytest.mark.parametrize("join_step", [1, 2, 3])
def test_a_run_stopped_after_at_or_before_the_join_goes_on_to_the_same_bits(
    data: Path, tmp_path: Path, join_step: int
) -> None:
    stage = replace(STAGE, join_step=join_step)
    whole = engine.train(stage, data, tmp_path / "whole", small_nets(), None)
    for steps in (2, 4):
        last = engine.train(replace(stage, steps=steps), data, tmp_path / "parts", small_nets(), None)
    assert_same_state(whole, last)


def test_processes_exchange_only_what_learns_and_then_what_one_would(data: Path, tmp_path: Path) -> None:
    """In mixed precision, too, whose wrapper is taken off and put on; and they wait for each other long enough."""
    alone = replace(STAGE, engine=replace(TINY.engine, save_every=2, mixed_precision="bf16"))
    alone = replace(alone, engine=replace(alone.engine, export_every=2))
    together = replace(alone, optimizer=replace(alone.optimizer, batch=1))
    engine.train(alone, data, tmp_path / "one", small_nets(), None)
    check = (
        "import torch; step = t.engine.Trainer._step\n"
        "def watched(self, *rest):\n"
        "    norm = step(self, *rest)\n"
        "    learns = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)\n"
        "    everything = sum(p.nbytes for g in self.optimizer.param_groups for p in g['params'])\n"
        "    told = self.model._get_ddp_logging_data()\n"
        "    exchanged = told['total_parameter_size_bytes']\n"
        "    assert told['gradient_as_bucket_view'], 'gradients would lie beside the buckets, too'\n"
        "    assert exchanged == learns and (learns < everything) == (self.step < 2), (exchanged, learns, self.step)\n"
        "    backend = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device('cpu'))\n"
        "    assert backend.options._timeout == t.engine.TIMEOUT\n"
        "    return norm\n"
        "t.engine.Trainer._step = watched\n"
    )
    launch(together, data, tmp_path / "two", 2, check)
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=5e-2)
    begun = small_nets().state_dict()
    for step, moved in ((2, False), (4, True)):
        after = weights_of(tmp_path / "two" / f"checkpoint-{step:07d}")
        assert torch.equal(after["reference_net.conv_in.weight"], begun["reference_net.conv_in.weight"]) != moved


@pytest.mark.parametrize(("fsdp", "name"), [(False, "DeepSpeed"), (True, "FSDP1")])
def test_who_cannot_let_parts_join_says_so(fsdp: bool, name: str) -> None:
    """They hold all that learns in pieces of memory that are made once."""
    parts = {part: [torch.nn.Parameter(torch.ones(1))] for part in STAGE.train}
    accelerator = SimpleNamespace(distributed_type="FSDP" if fsdp else "DEEPSPEED", is_fsdp2=False)
    trainer: Any = SimpleNamespace(config=STAGE, deepspeed=not fsdp, accelerator=accelerator)
    with pytest.raises(ConfigError, match=f"join_step=2 lets .* wait, and {name} .* or set join_step=0"):
        engine.Trainer._hold_back(trainer, parts)
    assert all(parameter.requires_grad for parameters in parts.values() for parameter in parameters)
    trainer.config = replace(STAGE, join_step=0)
    assert not engine.Trainer._hold_back(trainer, parts)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_parts_join_a_sharded_model(data: Path, mesh: Any) -> None:
    """FSDP2 shards every weight by itself, and lets one learn that did not before."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "register_fsdp_forward_method"):
        pytest.skip("this torch has no FSDP2")
    batch, begun, after = batches.collate([batches.TrainingSet(data, TINY)[0]]), small_nets(), []
    for sharded in (False, True):
        nets = deepcopy(begun)
        parts = {name for part in JOIN for name in _names(nets, part)}
        for name, parameter in nets.named_parameters():
            parameter.requires_grad_(name not in parts)
        model = flow.FlowModel(nets, Loss())
        if sharded:
            for kind in (ResnetBlock, SpatialTransformer, AudioModule, MemoryModule, DiffusionNet):
                for module in [module for module in model.modules() if isinstance(module, kind)]:
                    fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True)
            engine.gather_outside_forward(fsdp.fully_shard(model, mesh=mesh))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(3):
            if step == 2:
                model.requires_grad_(True)
            model(batch)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                waiting = [p.full_tensor() if sharded else p for n, p in nets.named_parameters() if n in parts]
                were = [p for n, p in begun.named_parameters() if n in parts]
                assert all(torch.equal(one, other) for one, other in zip(waiting, were))
        after.append({name: p.full_tensor() if sharded else p for name, p in nets.named_parameters()})
    moved = [name for name, p in begun.named_parameters() if not torch.equal(p, after[0][name])]
    assert set(moved) & parts and set(moved) - parts
    for name in moved:
        torch.testing.assert_close(after[1][name], after[0][name], rtol=1e-4, atol=1e-6)


def _names(nets: torch.nn.Module, part: str) -> list[str]:
    members = {id(parameter) for parameter in nets.parts()[part]}
    return [name for name, parameter in nets.named_parameters() if id(parameter) in members]
