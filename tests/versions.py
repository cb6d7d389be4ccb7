"""Runs the core's tests with other versions of Python and of the libraries, and writes versions.md beside this.

    python tests/versions.py [NAME ...] [--discard]

Each combination gets an environment in build/versions (3 to 6 GB where PyPI's torch is built for CUDA), which a later
run uses again. One whose Python or packages cannot be had is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".md")
# Import, load, sample, memory, store, video, emotion, download, adapters, command; the bits of diffusers, transformers.
TESTS = [f"tests/core/{name}" for name in ("checkpoint", "cli", "encoders", "inputs", "memory", "video")]
TESTS += [f"tests/core/{name}.py" for name in ("nets/test_networks", "sampling/test_sampling", "sampling/test_store")]
TESTS += ["tests/core/test_imports.py", "tests/core/test_pipeline.py"]
TESTS += ["--ignore-glob=*/test_fuzz*.py"]
LIMIT = 40 * 60  # seconds for the tests of one combination
SHOWN = ("torch", "transformers", "diffusers", "huggingface_hub", "av", "numpy", "librosa", "pillow", "safetensors")


@dataclass(frozen=True)
class Combination:
    """What is asked for; everything else is the newest that pip finds to go with it."""

    name: str
    python: str
    packages: tuple[str, ...]


COMBINATIONS = (
    Combination(
        "oldest",
        "3.10",
        ("torch==2.4.1", "transformers==4.44.2", "diffusers==0.30.3", "huggingface_hub==0.24.7", "av==14.2.0")
        + ("numpy==1.26.4", "librosa==0.10.2", "pillow==10.1.0", "pyyaml==6.0.1"),
    ),
    Combination("middle", "3.11", ("torch==2.6.0", "transformers==4.50.3", "av==15.0.0", "numpy==2.0.2")),
    # diffusers as well: its newest wants a huggingface_hub that transformers 4 refuses.
    Combination("transformers-4", "3.12", ("torch==2.13.0", "transformers<5", "av==16.0.0")),
    Combination("newest", "3.13", ("torch==2.13.0",)),
)


class Skipped(Exception):
    """A combination cannot be had."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [combination.name for combination in COMBINATIONS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of {', '.join(names)}")
    parser.add_argument("--discard", action="store_true", help="delete each environment after its tests")
    wanted = parser.parse_args()
    if unknown := set(wanted.names) - set(names):
        parser.error(f"no combination is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if hasattr(os, "nice"):
        os.nice(10)
    rows, broken = _rows(), False
    for combination in COMBINATIONS:
        if wanted.names and combination.name not in wanted.names:
            continue
        folder = ROOT / "build" / "versions" / combination.name
        date = time.strftime("%Y-%m-%d")
        try:
            python = _environment(folder, combination)
            counts, failed = _test(python, folder.with_suffix(".xml"))
            broken |= bool(failed)
            rows[combination.name] = [*_versions(python), *counts, date, " ".join(failed)]
        except Skipped as error:
            rows[combination.name] = [combination.python, *["-"] * (len(SHOWN) + 3), date, f"not run: {error}"]
        print(combination.name, *rows[combination.name], sep=" | ", flush=True)
        _write(rows)
        if wanted.discard:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(broken)


def _environment(folder: Path, combination: Combination) -> Path:
    """The interpreter of an environment that has what the combination asks for."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not _runs(python, "import pip"):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([_interpreter(combination.python), "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary=:all:"]
    newest = ["--upgrade", "--upgrade-strategy", "eager"]  # also in an environment of an earlier run
    # The last two are for tests alone, that our encoders compute as theirs do.
    beside = ("pytest", "hypothesis", "diffusers", "transformers")
    command = [*pip, *newest, "-e", ROOT, *combination.packages, *beside]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or ["pip failed"]
        raise Skipped(errors[-1].removeprefix("ERROR:").strip())
    # The tests of faces build small models with these; without them they are skipped.
    subprocess.run([*pip, *combination.packages, "onnx", "onnxruntime"], capture_output=True)
    return python


def _interpreter(version: str) -> Path:
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [Path(found) for found in [shutil.which(f"python{version}")] if found]
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    for candidate in candidates:
        if _runs(candidate, f"import ensurepip, sys, venv; assert sys.version.startswith('{version}.')"):
            return candidate
    raise Skipped(f"no Python {version} with venv on the path or under pyenv")


def _runs(python: Path, code: str) -> bool:
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def _test(python: Path, report: Path) -> tuple[list[str], list[str]]:
    """How many passed, failed and were skipped, and the names of those that failed."""
    report.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "fast"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}", *TESTS]
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        return ["-"] * 3, [f"stopped after {LIMIT // 60} minutes"]
    if not report.exists():
        return ["-"] * 3, [f"pytest ended with code {code} before its report"]
    suite = ElementTree.parse(report).getroot()[0]
    total, failures, errors, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    bad = failures + errors
    return [str(total - bad - skipped), str(bad), str(skipped)], failed


def _versions(python: Path) -> list[str]:
    code = (
        "import json, platform; from importlib.metadata import version;"
        f"print(json.dumps([platform.python_version(), *map(version, {SHOWN!r})]))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def _rows() -> dict[str, list[str]]:
    """Those of the last table, by combination: a run of one leaves the others."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| [a-z]", line)]
    return {row[0]: row[1:] for row in rows if row[0] != "combination"}


def _write(rows: dict[str, list[str]]) -> None:
    head = ["combination", "Python", *SHOWN, "passed", "failed", "skipped", "date", "what failed"]
    lines = [
        "# The core's tests with other versions",
        "",
        "Written by `make test-versions`: what was installed, on a CPU with one thread. `tests/versions.py` says",
        "what is asked for, and which tests run.",
        "",
        _line(head),
        _line(["---"] * len(head)),
        *(_line([each.name, *rows[each.name]]) for each in COMBINATIONS if each.name in rows),
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") or " " for cell in cells) + " |"


if __name__ == "__main__":
    main()
