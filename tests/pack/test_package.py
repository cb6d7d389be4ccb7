"""What an installed pack consists of, that it asks for nothing its host would mind, and that comfy-cli takes it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import pytest
from host.harness import ROOT, copy_pack, find_host, find_python, packed_files, working_tree

import memo_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest before Python 3.11

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()


@pytest.fixture(scope="module")
def files() -> list[str]:
    if not shutil.which("git"):
        pytest.skip("git is not installed: what would be packed is unknown")
    return packed_files()


# --- The archive ------------------------------------------------------------------------------------------------------

NEEDED = """
__init__.py LICENSE README.md pyproject.toml requirements.txt nodes/__init__.py memo_core/__init__.py memo_core/nets/
memo_core/kernels/ assets/portrait.png assets/voice.wav assets/song.flac assets/toon/diffusion_net/config.json
assets/toon/diffusion_net/diffusion_pytorch_model.safetensors assets/toon/reference_net/ assets/toon/vae/
assets/toon/wav2vec2/ assets/toon/emotion2vec/ assets/toon/misc/ workflows/ workflows/api/ web/docs/ locales/
""".split()


@pytest.mark.parametrize("needed", NEEDED)
def test_the_pack_has_what_it_needs_when_it_runs(files: list[str], needed: str) -> None:
    assert any(name.startswith(needed) if needed.endswith("/") else name == needed for name in files)


@pytest.mark.parametrize(
    "unwanted", ["tests", "training", "benchmarks", ".ci", "runs", "__pycache__", ".pytest_cache", "judge.safetensors"]
)
def test_the_pack_has_nothing_that_only_its_makers_need(files: list[str], unwanted: str) -> None:
    assert [name for name in files if unwanted in PurePosixPath(name).parts] == []


def test_the_pack_is_small_even_unpacked(files: list[str]) -> None:
    assert sum((ROOT / name).stat().st_size for name in files) < 30e6


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports absolutely, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_nothing_in_the_pack_imports_what_is_not_in_it(files: list[str]) -> None:
    absent = {"tests", "training", "benchmarks", "memo_core", "torchcodec", "mediapipe", "funasr", "insightface"}
    found = {name: imported(ROOT / name) & absent for name in files if name.endswith(".py")}
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_only_what_trains_a_speech_encoder_imports_the_libraries_that_networks_come_from(files: list[str]) -> None:
    """They are installed with the `training` extra alone."""
    found = {name for name in files if name.endswith(".py") and imported(ROOT / name) & {"diffusers", "transformers"}}
    assert found == {"memo_core/encoders/speech.py"}
    assert not {"diffusers", "transformers"} & set(REQUIREMENTS)


def test_the_core_knows_nothing_of_its_host(files: list[str]) -> None:
    host = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "nodes"}
    found = {name: imported(ROOT / name) & host for name in files if re.match(r"memo_core/.*\.py$", name)}
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_no_eval_exec_or_crowded_line(files: list[str]) -> None:
    """The rules of `comfy node validate`: a registry is to refuse packs that break them."""
    if not find_spec("ruff"):
        pytest.skip("ruff is not installed")
    python = [name for name in files if name.endswith(".py")]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "S102,S307,E702"]
    done = subprocess.run([*command, *python], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- comfy-cli --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory):
    """comfy(*arguments, cwd) -> what comfy-cli prints; it has a home of its own and is told not to track."""
    program = shutil.which("comfy", path=str(Path(sys.executable).parent)) or shutil.which("comfy")
    if program is None:
        pytest.skip("comfy-cli is not installed")
    env = os.environ | {"HOME": str(tmp_path_factory.mktemp("home"))}
    env.pop("XDG_CONFIG_HOME", None)

    def run(*arguments: str, cwd: Path) -> str:
        command = [program, "--skip-prompt", *arguments]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("tracking", "disable", cwd=ROOT)
    return run


@pytest.fixture(scope="module")
def checkout(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree as a fresh commit would have it: `comfy node pack` asks git, and writes where it stands."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in working_tree():
        if not name.startswith("tests/fixtures/"):  # 27 MB
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "tests" / "fixtures").mkdir(parents=True)
    (folder / "tests" / "fixtures" / "small.txt").write_text("stands for the fixtures\n")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    return folder


def test_comfy_cli_finds_nothing_wrong_and_packs_the_tested_list(comfy, checkout: Path, files: list[str]) -> None:
    said = comfy("node", "validate", cwd=checkout)
    assert "All validation checks passed" in said
    assert "arning" not in said
    comfy("node", "pack", cwd=checkout)
    assert (checkout / "node.zip").stat().st_size < 30e6
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        assert sorted(archive.namelist()) == files


# --- What it asks for -------------------------------------------------------------------------------------------------


def test_requirements_txt_says_what_pyproject_says() -> None:
    assert PROJECT["project"]["dependencies"] == REQUIREMENTS


def test_one_version_everywhere() -> None:
    assert PROJECT["project"]["version"] == memo_core.__version__


def test_nothing_is_pinned_and_nothing_asked_for_that_breaks_hosts() -> None:
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in REQUIREMENTS}
    assert not names & {"torchaudio", "torchvision", "torchcodec", "mediapipe", "funasr", "insightface", "xformers"}
    assert not names & {"imageio-ffmpeg", "ffmpeg-python", "opencv-python", "onnxruntime-gpu"}
    assert not [line for line in REQUIREMENTS if re.search("[<=~!]=?", line.replace(">=", ""))]


@pytest.mark.slow
def test_installing_it_changes_no_package_of_the_host(files: list[str], tmp_path: Path) -> None:
    folder = find_host()
    python = folder and find_python(folder)
    if not python:
        pytest.skip("no ComfyUI host at COMFYUI_PATH or ~/comfy/ComfyUI")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    listed = subprocess.run([*pip, "list", "--format=json"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"{python} has no pip")
    report = tmp_path / "report.json"
    command = [*pip, "install", "--dry-run", "--quiet", "--report", report, "-r", ROOT / "requirements.txt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if re.search("NewConnectionError|Max retries|name resolution|Could not find a version", done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    before = {canonical(package["name"]): package["version"] for package in json.loads(listed.stdout)}
    installs = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    changed = {canonical(entry["name"]): entry["version"] for entry in installs if canonical(entry["name"]) in before}
    assert changed == {}


def test_a_copy_of_the_pack_alone_finds_its_assets(files: list[str], tmp_path: Path) -> None:
    """As in custom_nodes: a folder with a space and letters that are not ASCII, memo_core imported from inside it."""
    copy_pack(tmp_path / "MÉMO pack ü")
    code = "import importlib; c = importlib.import_module('memo_core.checkpoint.layout')"
    code += "; print(c.assets(), c.find('toon'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "MÉMO pack ü",
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MÉMO pack ü") == 2
