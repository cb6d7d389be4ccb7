"""Compiles the Triton kernels between a step's products ahead of time, without a GPU: `python -m benchmarks.ahead`.

For every variant that tuning may choose, at the released widths, in bfloat16 with hidden states in float32: whether it
compiles for a card, and the most registers, bytes of stack (where they spill) and shared memory of a kernel's variants.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memo_core.kernels.triton import gate, groups, norm, residual, tools

TARGETS = (80, 86, 89, 90, 120)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KB that a program may have
WIDTHS = (320, 640, 1280)
_HALF, _FULL = "*bf16", "*fp32"


def sources() -> list[tuple[str, Any, dict[str, str], dict[str, Any], Any, int]]:
    """Name, kernel, types of its arguments, constants, its variants, stages."""
    found = []
    for width in WIDTHS:
        padded = triton.next_power_of_2(width)
        sizes = {"C": width, "CP": padded}
        counts = dict.fromkeys(("N", "rows", "x_r", "x_n", "y_r", "y_n", "shift_s", "scale_s"), "i32")
        pointers = {"x": _FULL, "y": _HALF, "shift": _HALF, "scale": _HALF, "total": _FULL, "out": _HALF, "eps": "fp32"}
        for add, modulated in ((False, False), (True, False), (True, True)):
            constants = {"x_c": 1, **sizes, "ADD": add, "MODULATED": modulated}
            found.append((f"norm{' of a sum' * add}{', modulated' * modulated}", norm.norm_kernel,
                          pointers | counts, constants, norm.row_variants, 1))  # fmt: skip
        counts = dict.fromkeys(("pixels", "each", "x_r", "x_p", "x_c", "shift_s"), "i32")
        shifted = {"SHIFTED": True, **sizes}
        found.append(("group statistics", groups.group_statistics_kernel,
                      {"x": _FULL, "shift": _HALF, "mean": _FULL, "spread": _FULL} | counts,
                      shifted | {"CHUNK": groups.PIXELS}, groups.pixel_variants, 1))  # fmt: skip
        pointers = {"x": _FULL, "shift": _HALF, "weight": _HALF, "bias": _HALF, "found": _FULL, "out": _HALF}
        found.append(("group norm", groups.group_norm_kernel, pointers | counts,
                      shifted | {"G": 32, "D": width // 32, "SILU": True}, groups.pixel_variants, 1))  # fmt: skip
        joined = {"C": width, "G": 32, "D": width // 32, "DP": triton.next_power_of_2(width // 32), "CHUNK": 128}
        pointers = {"mean": _FULL, "spread": _FULL, "found": _FULL, "pixels": "i32", "chunks": "i32", "eps": "fp32"}
        found.append(("group statistics joined", groups.join_statistics_kernel, pointers,
                      joined | {"BLOCK": 32}, lambda _: [(None, 4)], 1))  # fmt: skip
        pointers = {"x": _HALF, "weight": _HALF, "bias": _HALF, "out": _HALF, "rows": "i32", "x_m": "i32"}
        found.append(("gated product", gate.geglu_linear_kernel, pointers,
                      {"C": width, "N": 4 * width, "COLUMNS": 64, "DEPTH": 32}, gate.product_variants, 3))  # fmt: skip
    found.append(("gate", gate.geglu_kernel, {"x": _HALF, "out": _HALF, "total": "i32"}, {"C": 1280},
                  tools.flat_variants, 1))  # fmt: skip
    found.append(("sum", residual.add_kernel, {"x": _FULL, "y": _HALF, "out": _FULL, "total": "i32"}, {},
                  tools.flat_variants, 1))  # fmt: skip
    return found


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: int, warps: int, stages: int
) -> Any:
    """One variant for one compute capability, pointers and strides aligned as in the nets."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind != "fp32"}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(binary: Any) -> tuple[int, int, int]:
    """Registers, bytes of stack a thread (where registers spill) and shared bytes of a compiled kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, stack = (int(re.search(rf"{name}:(\d+)", said).group(1)) for name in ("REG", "STACK"))
    return used, stack, binary.metadata.shared


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead", description=__doc__)
    parser.add_argument("--target", type=int, nargs="+", default=TARGETS, choices=TARGETS, help="compute capabilities")
    args = parser.parse_args(arguments)
    rows: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    failed = 0
    for name, kernel, types, constants, variants, stages in sources():
        for block, warps in variants(constants):
            chosen = constants if block is None else constants | {"BLOCK": block}
            for target in args.target:
                try:
                    found = resources(compiled(kernel, types, chosen, target, warps, stages))
                except Exception as error:
                    failed += 1
                    print(f"{name}, {chosen}, {warps} warps, sm_{target}: {' '.join(str(error).split())[:300]}")
                    continue
                rows.setdefault((name, target), []).append(found)
    print(f"{'kernel':<26}{'target':>8}{'variants':>10}{'registers':>11}{'stack':>9}{'shared KB':>11}")
    for (name, target), found in rows.items():
        used, stack, shared = (max(values) for values in zip(*found))
        over = " more than a program may have" if shared > 1024 * SHARED[target] else ""
        print(f"{name:<26}{f'sm_{target}':>8}{len(found):>10}{used:>11}{stack:>9}{shared / 1024:>11.0f}{over}")
        failed += bool(over)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
