"""The house stands: modules import downwards only, and in no circle; also in functions, and for types alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from common import ROOT

# From the ground up; a module may import from its own layer's package and from those before it.
LAYERS = (
    *("release", "errors", "checks", "files", "tensorfile", "devices", "kernels", "nets", "encoders", "running"),
    *("checkpoint", "inputs", "memory", "video", "judging", "sampling", "budget", "pipeline", "cli"),
)
OLD = ("audio", "speed", "optimise")  # where names were before version 0.2


def modules() -> dict[str, Path]:
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "memo_core").rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}


def imported(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of memo_core that one imports, anywhere in it."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in known else ".".join(base))
    return found - {module}


GRAPH = {name: imported(name, path, modules()) for name, path in modules().items()}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer(module) for module in GRAPH} - {"", "__main__", *OLD} == set(LAYERS)


def test_no_arrow_points_upwards() -> None:
    upwards = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if layer(module) in LAYERS and layer(other) in LAYERS
        if LAYERS.index(layer(other)) > LAYERS.index(layer(module))
    ]
    assert upwards == []


def test_there_is_no_circle() -> None:
    left = {module: set(others) & set(GRAPH) for module, others in GRAPH.items()}
    while leaves := [module for module, others in left.items() if not others & set(left)]:
        for module in leaves:
            del left[module]
    assert sorted(left) == []


def private_uses(path: Path) -> list[str]:
    """What a file takes from other files of the project that is theirs alone."""
    own, found = set(), []
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        inside = isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").partition(".")[0] in ("memo_core", "nodes", "training", "benchmarks")
        )
        if inside:
            own |= {alias.asname or alias.name for alias in node.names}
            found += [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"]
    for node in ast.walk(tree):
        named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own
        if named and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append(f"{node.value.id}.{node.attr}")
    return [f"{path.relative_to(ROOT)}: {name}" for name in found]


def test_private_names_stay_in_their_files() -> None:
    folders = ("memo_core", "nodes", "training", "benchmarks")
    assert [use for folder in folders for path in (ROOT / folder).rglob("*.py") for use in private_uses(path)] == []


def test_the_drawing_in_the_documents_shows_the_layers_as_they_are() -> None:
    """Every package is in a row, and imports from lower rows alone."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawing = next(block for block in text.split("```") if "pipeline.py" in block and "kernels/" in block)
    rows = {name: row for row, line in enumerate(drawing.splitlines()) for name in re.findall(r"(\w+)(?:/|\.py)", line)}
    assert set(LAYERS) <= set(rows)
    wrong = {
        f"{layer(module)} -> {layer(other)}"
        for module, others in GRAPH.items()
        for other in others
        if layer(module) in LAYERS and layer(other) in LAYERS and layer(module) != layer(other)
        if rows[layer(module)] >= rows[layer(other)]
    }
    assert wrong == set()
