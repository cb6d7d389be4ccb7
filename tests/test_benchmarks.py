"""The benchmarks run to the end wherever they are started, keep what they have, and compare equal work."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cpu
from benchmarks import gpu, measures, networks, released
from benchmarks.results import Results
from benchmarks.timing import Parts
from memo_core import MemoPipeline

pytest.importorskip("matplotlib")


def test_the_cpu_benchmark_writes_figures_and_a_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["growth with windows", "tiny", "tiny, presets", "kernels"]
    cpu.main(["--quick", "--out", str(tmp_path), "--only", *parts])
    stored = json.loads((tmp_path / "cpu-quick.json").read_text())
    assert stored["hardware"]["torch"] == torch.__version__ and stored["hardware"]["cpu"]
    measured = stored["measured"]
    assert list(measured) == parts and not any("error" in found or "failed" in found for found in measured.values())
    against = measured["tiny"]
    assert against["relative error of latents against released schedule"]["exact"] < 1e-4
    assert set(against["median"]["released schedule"]) >= {"end to end", "reference net", "memory inputs", "vae decode"}
    assert len(against["seconds"]["exact"]["end to end"]) == 2
    assert 0 < measured["tiny, presets"]["relative error of latents against exact"]["draft"] < 1
    assert measured["growth with windows"]["windows"]["5"]["memory state, bytes"] > 0
    assert (tmp_path / "cpu-quick.png").stat().st_size > 10_000
    assert "exact" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cpu.main(["--quick", "--out", str(tmp_path), "--only", "nothing"])


def test_the_gpu_benchmark_can_be_tried_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One part fails: it is noted, the others are measured, and the next call makes up for it alone."""
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    with monkeypatch.context() as broken:

        def no_room(*args: object, **kwargs: object) -> dict:
            raise torch.cuda.OutOfMemoryError("no room for so many")

        broken.setattr(measures, "over_pixels", no_room)
        gpu.main(arguments)
    measured = json.loads((tmp_path / "gpu-tiny.json").read_text())["measured"]
    failed = [name for name, found in measured.items() if "error" in found or "failed" in found]
    assert failed == ["growth with pixels"] and "no room" in measured["growth with pixels"]["error"]
    assert list(measured) == list(gpu.Bench("cpu", tiny=True).parts)
    assert set(measured["window"]["frames a second"]) == {measures.RELEASED, *measures.presets()}
    step = measured["roofline"][released.DIFFUSION_STEP]
    of_parts = [row["operations a step"] for part, row in measured["roofline"].items() if part != "diffusion step"]
    assert 0.5 * step["operations a step"] < sum(of_parts) < step["operations a step"] and step["share of peak"] > 0
    assert (tmp_path / "gpu-tiny.png").stat().st_size > 10_000
    capsys.readouterr()
    gpu.main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("measured already") == len(measured) - 1
    stored = json.loads((tmp_path / "gpu-tiny.json").read_text())["measured"]
    assert not any("error" in found for found in stored.values())


def test_time_that_is_up_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--limit", "-1"])
    assert capsys.readouterr().out.count("call again") == len(gpu.Bench("cpu", tiny=True).parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main(["--out", str(tmp_path)])


def test_figures_of_another_machine_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    Results(path).put("part", {"seconds": 1.0})
    assert Results(path).has("part")
    stored = json.loads(path.read_text())
    stored["hardware"]["cpu"] = "another"
    path.write_text(json.dumps(stored))
    assert not Results(path).has("part")


def test_parts_are_measured_by_themselves() -> None:
    parts, layer = Parts(), torch.nn.Linear(2, 2)
    with parts("outer"):
        time.sleep(0.01)
        with parts("inner"):
            time.sleep(0.02)
        with parts.watching({"layer": [layer]}):
            layer(torch.zeros(1, 2))
    layer(torch.zeros(1, 2))
    seconds = parts.seconds()
    assert seconds["outer"] > seconds["inner"] >= 0.02 and parts.counts() == {"inner": 1, "layer": 1, "outer": 1}


def test_watching_changes_nothing() -> None:
    nets = networks.tiny()
    job = networks.clip(MemoPipeline(nets), 64, 1, steps=1)
    plain = torch.cat(list(measures.windows_of(nets, job, measures.EXACT)))
    methods = set(vars(nets.diffusion_net))
    parts = Parts()
    watched = torch.cat(list(measures.windows_of(nets, job, measures.EXACT, parts)))
    assert torch.equal(plain, watched) and set(vars(nets.diffusion_net)) == methods
    counts = parts.counts()
    assert counts["diffusion step"] == counts["reference net"] / 2 == 1  # the portrait, and what came before
    assert counts["memory inputs"] and counts["residual blocks"] and counts["vae decode"]
