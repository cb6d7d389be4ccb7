"""What one window costs on a GPU, counted: `python -m benchmarks.costs`, half a minute without a GPU or weights.

The released networks run on tensors without data, and every operator says how many operations it does and how many
bytes it reads and writes, as torch runs it eagerly on CUDA in bfloat16 at 512 x 512: inputs and outputs once each, what
is broadcast once, views for nothing; copies of what an operator wants contiguous, cuDNN's own of maps that are not
channels-last, group norm's second reading; attention and the kernels of this project as one operator each.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from memo_core import kernels
from memo_core.budget.counting import GIB, SHORTCUTS
from memo_core.budget.plan import choose_plan
from memo_core.budget.report import DRIVER, released
from memo_core.kernels import shapes
from memo_core.nets.conditions import Conditions
from memo_core.nets.past import in_turn
from memo_core.release import WINDOW
from memo_core.running import precision
from memo_core.sampling.settings import Settings

SIZE, TERA, GIGA = 512, 1e12, 1e9
TIMED = "for a model of seconds, TFLOP"  # `Costs.work` and `Costs.transposed`: benchmarks.model reads them
CARDS = (8, 12, 16, 24)
HEADS = (32, 64, 96, 128, 192, 256)  # widths that flash attention is made for; others are filled up
_aten = torch.ops.aten
_KINDS = {
    "linear": "matrix products", "mm": "matrix products", "bmm": "matrix products", "addmm": "matrix products",
    "baddbmm": "matrix products", "matmul": "matrix products", "convolution": "convolutions", "conv2d": "convolutions",
    "layer_norm": "norms", "native_layer_norm": "norms", "group_norm": "norms", "native_group_norm": "norms",
    "cat": "copies", "clone": "copies", "repeat": "copies", "copy_": "copies", "_to_copy": "casts", "to": "casts",
    "contiguous": "copies", "index": "copies", "upsample_nearest2d": "copies", "repeat_interleave": "copies",
    "memory_attention": "memory kernels", "memory_sums": "memory kernels", "update_memory": "memory kernels",
    "modulated_norm": "norms", "add_norm": "norms", "geglu_linear": "matrix products",
}  # fmt: skip


class Costs(TorchDispatchMode):
    """Inside it, adds up operations and bytes moved.

    Attributes:
        operations: floating-point, a multiplication and an addition being two.
        bytes: by kind of operator.
        work: operations as they take time, by kind: float32 counts twice (TF32), attention in the head widths that
            flash attention is made for.
        transposed: bytes among all that are read in another order than they are written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, defaultdict(int)
        self.work, self.transposed = defaultdict(int), 0

    def __torch_dispatch__(  # noqa: C901 -- a case for each kind of operation
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        short = SHORTCUTS.get(func) if args and isinstance(args[0], Tensor) else None
        result = func(*args, **(kwargs or {})) if short is None else short(*args)
        if _KINDS.get(func._schema.name.split("::")[1]) == "convolutions" and not args[0].is_contiguous():
            result = torch.empty_like(result, memory_format=torch.channels_last)  # as cuDNN answers channels-last maps
        given = list(_tensors((args, kwargs)))
        made = list(_tensors(result))
        if all(any(x.untyped_storage()._cdata == g.untyped_storage()._cdata for g in given) for x in made) and not (
            func._schema.is_mutable
        ):
            return result  # views
        name = func._schema.name.split("::")[1]
        if name.startswith(("empty", "new_empty")):
            return result
        kind, before = _KINDS.get(name, "pointwise"), self.operations
        if (
            kind in ("pointwise", "copies", "casts")
            and len({_order(x) for x in (*given, *made) if _alike(x, made[0])}) > 1
        ):
            self.transposed += sum(map(moved, given)) + sum(map(moved, made))
        read = [x for x in given if x is not (kwargs or {}).get("out")]
        self.bytes[kind] += sum(map(moved, read)) + sum(map(moved, made))
        if kind in ("norms", "matrix products") and not args[0].is_contiguous() and name != "group_norm":
            self.bytes["copies"] += 2 * moved(args[0])
            self.transposed += 2 * moved(args[0])
        if "group_norm" in name:
            if not args[0].is_contiguous():
                self.bytes["copies"] += 2 * moved(args[0])
                self.transposed += 2 * moved(args[0])
            self.bytes[kind] += moved(args[0])
        strided = kind == "convolutions" and not args[0].is_contiguous(memory_format=torch.channels_last)
        if strided and result.itemsize == 2:
            self.bytes["cuDNN's layout changes"] += 2 * moved(args[0]) + 2 * moved(result)
        count = flop_registry.get(func._overloadpacket)
        if name == "linear":
            self.operations += 2 * args[0].numel() * args[1].shape[0]
        elif name == "conv2d":
            self.operations += 2 * result.numel() * args[1][0].numel()
        elif count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        if self.operations > before:
            self.work[kind] += (self.operations - before) * (1 if result.itemsize == 2 else 2)
        return result

    def kernel(self, kind: str, operations: int, *tensors: Any) -> None:
        """One kernel that reads and writes these."""
        self.operations += operations
        if kind != "attention":  # which knows its own
            self.work[kind] += operations
        self.bytes[kind] += sum(map(moved, _tensors(tensors)))


def moved(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers, those that a broadcast repeats once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        numbers *= size if stride or size == 0 else 1
    return numbers * tensor.itemsize


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Its axes, those that are there and not repeated, from the slowest to the fastest."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size > 1 and tensor.stride(axis)]
    return tuple(sorted(axes, key=lambda axis: -tensor.stride(axis)))


def _alike(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are of one rank and about as large."""
    return tensor.dim() == other.dim() and 4 * moved(tensor) >= moved(other)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class _Attention(TorchFunctionMode):
    """Attention as one kernel."""

    def __init__(self, costs: Costs):
        super().__init__()
        self.costs = costs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._C._nn.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        # As flash attention leaves it: one frame's tokens after the other, heads within.
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        products = batch * heads * tokens * key.shape[2] * (query.shape[-1] + value.shape[-1])
        self.costs.kernel("attention", 2 * products, query, key, value, out)
        wide = next((width for width in HEADS if width >= query.shape[-1]), query.shape[-1]) / query.shape[-1]
        self.costs.work["attention"] += int(2 * products * wide) * (1 if query.itemsize == 2 else 2)
        return out


@contextmanager
def counted() -> Iterator[Costs]:
    """Counts what is done inside, on tensors without data, as on a card that runs the project's kernels."""
    with torch.inference_mode(), Costs() as costs, _Attention(costs), kernels.as_shapes():
        counting = {name: _counting(costs, it) for name, it in vars(shapes).items() if inspect.isfunction(it)}
        with mock.patch.multiple(shapes, **counting):
            yield costs


def _counting(costs: Costs, allocate: Callable[..., Any]) -> Callable[..., Any]:
    """One of the project's kernels as what reads its inputs, here all of them by position, and writes its outputs."""
    name = allocate.__name__

    def kernel(*given: Any) -> Any:
        made, operations, read = allocate(*given), 0, given
        if name == "memory_attention":
            query, key, _, memory = given
            operations = 2 * query.numel() * (2 * key.shape[1] + (0 if memory is None else query.shape[-1]))
        elif name in ("memory_sums", "update_memory"):
            operations = 2 * given[-2].numel() * given[-2].shape[-1]
        elif name == "geglu_linear":
            operations = 2 * given[0].numel() * len(given[1])
        elif name == "add" and given[0].stride() != given[1].stride():
            costs.kernel("copies", 0, given[1], given[1])
        elif name == "layer_norm":  # of these norms without the weights, which are little
            read = given[:1]
        elif name == "add_norm":
            read = given[:2]
        elif name == "group_norm":  # x is read twice; the shift is the last but one
            read = given[0], given[0], given[-2]
        costs.kernel(_KINDS.get(name, "pointwise"), operations, read, made)
        return made

    return kernel


# --- The parts --------------------------------------------------------------------------------------------------------


def _parts_of(net: nn.Module) -> dict[str, str]:
    """Kinds of the Diffusion Net's modules, by the names of their classes."""
    return {
        "SpatialTransformer": "spatial attention",
        "AudioModule": "audio attention",
        "MemoryModule": "memory modules",
        "ResnetBlock": "residual blocks",
    }


def step(nets: Any, height: int, width: int) -> dict[str, dict[str, Any]]:
    """A step with both rows of guidance: whole, and by part."""
    net, size, dtype, batch = nets.diffusion_net, (height // 8, width // 8), torch.bfloat16, 2

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    face = numbers(batch, nets.image_proj.tokens, net.config.cross_attention_dim)
    with counted():
        past = nets.reference_net(numbers(batch * WINDOW, 4, *size), numbers(batch * WINDOW, *face.shape[1:]))
        sums = [layer.carries.of_window(key, value) for layer, key, value in net.past(past, *size, WINDOW)]
        conditions = Conditions(
            reference=[feature[:1][None] for feature in past],  # as the released rows go: two sets count alike
            face_tokens=face,
            audio_tokens=numbers(batch, WINDOW, nets.audio_proj.tokens, net.config.audio_attention_dim),
            emotion=torch.empty(batch, dtype=torch.long, device="meta"),
            frames=WINDOW,
        )
        prepared = net.prepare(conditions)
        shifts = net.time_shifts(torch.zeros(1, device="meta"), dtype)
    latents = numbers(1, 4, WINDOW, *size).to(precision.carried(dtype))
    found: dict[str, dict[str, Any]] = {}
    stack: list[tuple[str, int, dict[str, int]]] = []
    kinds, handles = _parts_of(net), []
    for module in net.modules():  # as `optimise` has it by default where the kernels run
        if hasattr(module, "fuse"):
            module.fuse()
    with counted() as costs:
        for module in net.modules():
            part = kinds.get(type(module).__name__)
            if part is not None:

                def before(*_: Any, part: str = part) -> None:
                    stack.append((part, costs.operations, dict(costs.bytes)))

                def after(*_: Any) -> None:
                    part, operations, moved_before = stack.pop()
                    row = found.setdefault(part, {"operations": 0, "bytes": defaultdict(int)})
                    row["operations"] += costs.operations - operations
                    for kind, count in costs.bytes.items():
                        row["bytes"][kind] += count - moved_before.get(kind, 0)

                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        net(latents, shifts, prepared, in_turn(sums))
    for handle in handles:
        handle.remove()
    whole = _row(costs)
    rest = {"operations": whole["operations"] - sum(row["operations"] for row in found.values())}
    rest["bytes"] = {k: n - sum(row["bytes"].get(k, 0) for row in found.values()) for k, n in costs.bytes.items()}
    return {"step": whole, **found, "resampling, in, out": rest}


def _row(costs: Costs, times: int = 1) -> dict[str, Any]:
    work = {kind: round(times * count / TERA, 2) for kind, count in costs.work.items() if count}
    return {
        "operations": times * costs.operations,
        "bytes": {kind: times * count for kind, count in costs.bytes.items()},
        TIMED: {**work, "transposed, GB": round(times * costs.transposed / GIGA, 1)},
    }


def window(height: int = SIZE, width: int = SIZE) -> dict[str, dict[str, Any]]:
    """TFLOP and GB moved of every part of a window, by kind of operator."""
    nets = released()
    size = (height // 8, width // 8)

    def numbers(half: nn.Module, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=half.conv_in.weight.dtype, device="meta")

    rows = step(nets, height, width)
    face = torch.empty(
        2 * WINDOW, 4, nets.diffusion_net.config.cross_attention_dim, dtype=torch.bfloat16, device="meta"
    )
    with counted() as costs:
        past = nets.reference_net(numbers(nets.reference_net, 2 * WINDOW, 4, *size), face)
    rows["Reference Net on a past window"] = _row(costs)
    with counted() as costs:
        for layer, key, value in nets.diffusion_net.past(past, *size, WINDOW):
            layer.carries.of_window(key, value)
    rows["memory sums of it"] = _row(costs)
    for name, half, run, shape in (
        ("VAE decode, 16 frames", nets.vae.decoder, nets.vae.decode, (1, 4, *size)),
        ("VAE encode, 16 frames", nets.vae.encoder, nets.vae.encode, (1, 3, height, width)),
    ):
        with counted() as costs:
            run(numbers(half, *shape), return_dict=False)
        rows[name] = _row(costs, WINDOW)
    return {
        name: {
            "TFLOP": round(row["operations"] / TERA, 2),
            "GB": round(sum(row["bytes"].values()) / GIGA, 1),
            **{kind: round(count / GIGA, 1) for kind, count in sorted(row["bytes"].items()) if count > 5e7},
            **({TIMED: row[TIMED]} if TIMED in row else {}),
        }
        for name, row in rows.items()
    }


def plans() -> dict[str, dict[str, str]]:
    """Peaks of `exact` and `balanced` by card, in GiB, and what waits on the host."""
    nets, found = released(), {}
    for speed in ("exact", "balanced"):
        settings, row = Settings(speed=speed), {}
        for card in (*CARDS, None):
            room = None if card is None else card * GIB - DRIVER
            try:
                plan = choose_plan(nets, SIZE, SIZE, settings, 10**12 if room is None else room)
            except Exception as error:
                row[str(card)] = str(error)
                continue
            host = f", {plan.on_host / GIB:.1f} on the host" if plan.on_host else ""
            row["no limit" if card is None else f"{card} GB"] = f"{plan.peak / GIB:.1f}{host}"
        found[speed] = row
    return found


def looks(windows: int = 40) -> dict[str, float]:
    """Windows that the Reference Net looks at for each new one, on average after the first eight."""
    from memo_core import MemoryState
    from memo_core.memory.cache import MemoryCache
    from memo_core.nets.past import LinearSums

    found, face = {}, torch.zeros(1, 512)
    for dtype in (torch.float32, torch.bfloat16):
        state, cache, looked, each = MemoryState.empty(), MemoryCache(), [], []
        layer = SimpleNamespace(carries=LinearSums())

        def past_of(entry: Any, looked: list = looked) -> list[tuple[Any, Tensor, Tensor]]:
            looked.append(entry.digest)
            return [(layer, torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1))]

        for number in range(windows + 8):
            latents = torch.randn(WINDOW, 4, 2, 2, generator=torch.Generator().manual_seed(number)).to(dtype)
            state = state.push(latents, face, "model", "reference")
            looked.clear()
            cache.memory_of(state, "", past_of)
            each.append(len(looked))
        found[str(dtype).removeprefix("torch.")] = sum(each[8:]) / windows
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args(arguments)
    rows = window()
    print(f"{'':<34}{'TFLOP':>8}{'GB':>8}")
    for name, row in rows.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in row.items() if kind not in ("TFLOP", "GB", TIMED))
        print(f"{name:<34}{row['TFLOP']:>8}{row['GB']:>8}   {kinds}")
    report = {"window": rows, "plans": plans(), "windows looked at for each new one": looks()}
    for name in ("plans", "windows looked at for each new one"):
        print(f"\n{name}: {json.dumps(report[name], indent=1)}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
