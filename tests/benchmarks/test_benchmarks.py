"""The benchmarks run to the end wherever they are started, keep what they have, and compare equal work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cpu
from benchmarks import costs, gpu, measures, model, networks, released
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


# What stands for the process of a part: it has three seconds or less, and writes as a part does.
WRITES = """
import json, os, pathlib, subprocess, sys, time
path = pathlib.Path({path!r})
hardware = {{"cpu": "any"}}
stored = json.loads(path.read_text()) if path.exists() else {{"hardware": hardware, "measured": {{}}}}
def write(part, found):
    stored["measured"][part] = found
    path.write_text(json.dumps(stored))
"""
PROCESSES = {
    "card": "write('card', {'copy, bytes a second': 2e12})",
    "kernels": "helper = subprocess.Popen(['sleep', '60']); (path.parent / 'helper').write_text(str(helper.pid)); "
    "time.sleep(60)",
    "budget": "write('budget', {'exact, 12 GiB': {'plan': 'turns', 'runs within': True, 'planned, bytes': 10**10, "
    "'peak allocated, bytes': 10**10, 'peak reserved, bytes': 10**10}, 'error': 'unfinished'}); time.sleep(60)",
    "window": "os.abort()",
    "roofline": "write('roofline', {'diffusion step': {'seconds a step': 0.1, 'TFLOP/s': 500.0, 'share of peak': .4}})",
}


@pytest.mark.skipif(sys.platform == "win32", reason="processes are told to end by signals")
def test_first_loses_nothing_to_parts_that_hang_crash_or_eat_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, begun = tmp_path / "gpu-tiny.json", []

    def command(part: str, args: object) -> list[str]:
        if begun:  # whole after each
            assert set(json.loads(path.read_text())["measured"]) == set(begun)
        begun.append(part)
        return [sys.executable, "-c", WRITES.format(path=str(path)) + PROCESSES[part]]

    monkeypatch.setattr(gpu, "command", command)
    start = time.monotonic()
    arguments = ["--first", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--only"]
    gpu.main(["--limit", "6", *arguments, *PROCESSES])
    assert time.monotonic() - start < 12 and begun == list(PROCESSES)
    measured = json.loads(path.read_text())["measured"]
    assert "error" not in measured["card"] and "error" not in measured["roofline"]
    assert measured["kernels"]["error"].startswith("stopped after")
    assert measured["budget"]["error"].startswith("stopped after") and measured["budget"]["exact, 12 GiB"]["plan"]
    assert "-6" in measured["window"]["error"]
    helper = Path(f"/proc/{(tmp_path / 'helper').read_text()}/stat")
    assert not helper.exists() or helper.read_text().split()[2] == "Z"  # what a part has started ends with it
    printed = capsys.readouterr().out
    assert "peak within the plan by 10%: exact, 12 GiB: pass" in printed and "a copy moves 200 GB" in printed
    begun.clear()
    monkeypatch.setattr(gpu, "command", lambda part, args: begun.append(part) or [sys.executable, "-c", ""])
    gpu.main([*arguments, *PROCESSES])  # the first again, to see whose figures they are; then what is missing
    assert begun == ["card", "kernels", "budget", "window"]


def test_a_card_too_small_for_its_plan_is_told_and_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(bench: gpu.Bench, job: object, plan: object, allowed: int | None) -> tuple[float, int, int]:
        if allowed is not None:
            raise torch.cuda.OutOfMemoryError("too little")
        return 1.6, 12 * 10**8, 13 * 10**8

    monkeypatch.setattr(gpu.Bench, "_planned", planned)
    row = gpu.Bench("cpu", tiny=True)._within("exact", 10**9)
    assert not row["runs within"] and row["peak allocated, bytes"] == 12 * 10**8 and row["seconds a frame"] == 0.1


def test_a_part_gets_its_share_of_what_is_left() -> None:
    todo = list(gpu.SECONDS)
    assert gpu.share("card", todo, gpu.LIMIT) == gpu.SECONDS["card"]  # all that are essential have time enough
    short = gpu.share("card", todo, sum(gpu.ESSENTIAL.values()) / 2)
    assert short == gpu.SECONDS["card"] / 2
    assert gpu.share("option: compiled", ["option: compiled"], 100) == 100
    assert todo[-2:] == ["option: compiled", "option: these four"]  # what takes longest comes last


def test_what_is_known_so_far_is_written_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"

    def part() -> Iterator[dict[str, float]]:
        yield {"exact": 0.123456789}
        stored = json.loads(path.read_text())["measured"]["part"]
        assert stored == {"exact": 0.12346, "error": "unfinished"} and not Results(path).has("part")
        raise RuntimeError("illegal access")

    found = Results(path).add("part", part)
    assert found == {"exact": 0.12346, "error": "RuntimeError: illegal access"}
    assert json.loads(path.read_text())["measured"]["part"] == found
    assert Results(path).add("part", lambda: iter([{"a": 1}, {"a": 1, "b": 2}])) == {"a": 1, "b": 2}


def test_goals_pass_or_fail_and_what_was_not_measured_does_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = gpu.goals({}, "H200")
    assert len(unknown) == 5 and not any("pass:" in line or "FAIL" in line for line in unknown)
    window = {"size": 512, "seconds a frame": {"exact": 0.17}, "frames a second": {"live": 20.0}}
    peak = {"peak allocated, bytes": 95, "planned, bytes": 100, "peak reserved, bytes": 99, "runs within": True}
    rows = {"fits": peak, "above": peak | {"peak allocated, bytes": 112}, "none": peak | {"runs within": False}}
    norm = {"naive, relative error": 0.03, "triton, relative error": 0.004, "triton, share of copy bandwidth": 0.7}
    kernels = {"norm": norm, "sums": norm | {"triton, share of copy bandwidth": 0.5}}
    lines = gpu.goals({"window": window, "budget": rows, "kernels": kernels}, "H200")
    assert ["pass" in line.rpartition(": ")[0] for line in lines] == [
        True,
        False,
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert "no such preset" in lines[1] and "OUT OF MEMORY" in lines[4]
    wrong = kernels | {"sums": norm | {"triton, relative error": 0.3}}
    slow = gpu.goals({"window": window | {"seconds a frame": {"exact": 0.19}}, "kernels": wrong}, "H200")
    assert "FAIL: 0.19" in slow[0] and "FAIL: 0.3 at most, sums" in slow[3]
    assert "not measured" in gpu.goals({"window": window | {"size": 64}}, "H200")[0]
    monkeypatch.setattr(measures, "presets", lambda: ["exact", "live"])
    assert "FAIL: 20" in gpu.goals({"window": window}, "H200")[1]


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


def test_operators_cost_what_they_read_and_write() -> None:
    def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with costs.counted() as found:
        torch.nn.functional.linear(numbers(4, 8), numbers(16, 8))
        assert found.operations == 2 * 4 * 8 * 16 and found.bytes == {"matrix products": 2 * (32 + 128 + 64)}
    with costs.counted() as found:
        numbers(2, 3, 4).transpose(1, 2).unflatten(1, (2, 2)) + numbers(1, 1, 1, 1).expand(2, 2, 2, 3)
        assert found.bytes == {"pointwise": 2 * (24 + 1 + 24)} and not found.transposed
    with costs.counted() as found:
        numbers(2, 4, 4) + numbers(2, 4, 4).transpose(1, 2)
        assert found.transposed == found.bytes["pointwise"] == 3 * 2 * 32
    maps, weight = numbers(1, 4, 8, 8), numbers(4, 4, 1, 1)
    with costs.counted() as found:
        torch.nn.functional.conv2d(maps, weight)
        assert found.bytes["cuDNN's layout changes"] == 4 * maps.nbytes
    with costs.counted() as found:
        torch.nn.functional.conv2d(maps.to(memory_format=torch.channels_last), weight)
        assert "cuDNN's layout changes" not in found.bytes
    heads = numbers(1, 8, 64, 40)
    with costs.counted() as found:
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    assert found.operations == 4 * 8 * 64 * 64 * 40 and found.bytes == {"attention": 4 * heads.nbytes}
    assert found.work["attention"] == 4 * 8 * 64 * 64 * 64  # as wide as flash attention makes it


def test_a_model_of_seconds_takes_the_longer_of_operations_and_bytes() -> None:
    rates = model.Rates(products=100, convolutions=100, attention=50, bandwidth=1)
    work = {"matrix products": 10.0, "attention": 1.0, "transposed, GB": 35.0}
    row = {"TFLOP": 11.0, "GB": 250.0, "matrix products": 50.0, "attention": 100.0, "copies": 100.0, costs.TIMED: work}
    found = model.seconds(row, rates)
    assert found == pytest.approx(
        {"matrix products": 0.1, "attention": 0.1, "copies": 0.1, "read in another order": 0.065}
    )
    names = ["step", "Reference Net on a past window", "memory sums of it"]
    names += ["VAE decode, 16 frames", "VAE encode, 16 frames"]
    report = {"window": dict.fromkeys(names, row), "windows looked at for each new one": {"bfloat16": 1.5}}
    assert model.frame(report, rates, "exact", 1.5) == pytest.approx((20 + 2 * 1.5 + 2) * 0.365 / 16)
    assert "| a | b |" in model.table({"a": report, "b": report})
