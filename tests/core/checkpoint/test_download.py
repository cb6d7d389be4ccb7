"""Downloads from a small hub on this machine: resumed, checked, recorded; and what is said when there is none."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from common import ROOT

from memo_core.checkpoint import download as module
from memo_core.checkpoint.download import (
    COMPONENTS,
    RELEASE_FILES,
    ReleaseFile,
    download,
    licences,
    missing_files,
    offline_instructions,
    verify,
)
from memo_core.errors import DownloadError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 10 * 1024 * 1024  # the hub package writes this much at a time


class Hub(ThreadingHTTPServer):
    """Answers as the Hugging Face hub does: HEAD tells commit, size and checksum, GET sends all or the Range."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {}  # "repository/name"
        self.small: set[str] = set()  # kept in git itself, so that the checksum is git's
        self.damaged: set[str] = set()
        self.sends_at_most: int | None = None  # then the line breaks
        self.stalls = False  # or hangs
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> list[tuple[str, str | None]]:
        return [(name, wanted) for method, name, wanted in self.requests if method == "GET"]


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        key = f"{repository}/{name}"
        content = self.server.files.get(key)
        if repository != self.path[1:]:  # the hub package also asks for things of its own
            self.server.requests.append((self.command, key, self.headers.get("Range")))
        if content is None or revision not in ("main", COMMIT):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Connection", "close")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        checksum = hashlib.sha256(content).hexdigest()
        if key in self.server.small:
            checksum = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if key in self.server.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(self.headers["Range"][6:].split("-")[0]) if "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Connection", "close")  # or the next test's client may ask this test's hub
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{checksum}"')
        self.end_headers()
        if body:
            limit = self.server.sends_at_most
            self.wfile.write(content[start:] if limit is None else content[start:limit])
            if limit is not None and limit < len(content):
                self.wfile.flush()
                while self.server.stalls:
                    time.sleep(0.05)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub that the package asks, and a release of four files on it."""
    from huggingface_hub import constants, file_download

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    for place in (constants, file_download):  # older versions of the package keep a copy in the second
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    contents = {
        "memoavatar/memo/image_proj/config.json": b'{"_class_name": "ImageProjModel"}',
        "memoavatar/memo/image_proj/weights": os.urandom(100_000),
        "memoavatar/memo/misc/face_analysis/models/glintr100.onnx": os.urandom(5_000),
        "stabilityai/sd-vae-ft-mse/weights": os.urandom(50_000),
    }
    server.files |= contents
    server.small.add("memoavatar/memo/image_proj/config.json")
    known = hashlib.sha256(contents["stabilityai/sd-vae-ft-mse/weights"]).hexdigest()
    files = [
        ReleaseFile("memo", "image_proj/config.json", "image_proj/config.json", 33),
        ReleaseFile("memo", "image_proj/weights", "image_proj/weights", 100_000),
        ReleaseFile("face", *["misc/face_analysis/models/glintr100.onnx"] * 2, 5_000),
        ReleaseFile("vae", "weights", "vae/weights", 50_000, known),
    ]
    monkeypatch.setattr(module, "RELEASE_FILES", tuple(files))
    yield server
    server.stalls = False
    server.shutdown()
    server.server_close()


def content(hub: Hub, file: ReleaseFile) -> bytes:
    return hub.files[f"{file.repository}/{file.name}"]


def test_everything_is_fetched_into_its_place_recorded_and_verified(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoint"
    assert len(missing_files(folder)) == 4
    fetched = download(folder, progress=False)
    for file in module.RELEASE_FILES:
        assert (folder / file.target).read_bytes() == content(hub, file)
        assert folder / file.target in fetched
    assert missing_files(folder) == [] and set(verify(folder).values()) == {"good"}
    assert sorted(path.name for path in folder.iterdir()) == ["image_proj", "memo_download.json", "misc", "vae"]
    before = len(hub.requests)
    assert download(folder) == [] and len(hub.requests) == before  # nothing is asked again
    assert "Nothing is missing" in offline_instructions(folder)


def test_only_the_components_asked_for_are_fetched(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, only=["vae"], progress=False)
    assert [name for name, _ in hub.fetched()] == ["stabilityai/sd-vae-ft-mse/weights"]
    assert [file.component for file in missing_files(tmp_path)] == ["memo", "memo", "face"]
    assert missing_files(tmp_path, only=["vae"]) == []
    with pytest.raises(DownloadError, match="unknown component 'faces'; allowed are memo, vae"):
        download(tmp_path, only=["faces"])


def test_files_put_there_by_hand_are_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "image_proj").mkdir()
    (tmp_path / "image_proj" / "weights").write_bytes(b"mine")
    (tmp_path / "vae").mkdir()
    shutil.copy(Path(__file__), tmp_path / "vae" / "weights")
    download(tmp_path, progress=False)
    assert (tmp_path / "image_proj" / "weights").read_bytes() == b"mine"
    states = verify(tmp_path)
    assert states["image_proj/weights"] == "unknown" and states["vae/weights"] == "changed"


def test_verify_sees_changed_and_missing_files(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, progress=False)
    path = tmp_path / "image_proj" / "weights"
    path.write_bytes(path.read_bytes()[::-1])
    (tmp_path / "vae" / "weights").unlink()
    assert verify(tmp_path) == {
        "image_proj/config.json": "good",
        "image_proj/weights": "changed",
        "misc/face_analysis/models/glintr100.onnx": "good",
        "vae/weights": "missing",
    }
    path.write_bytes(b"cut")  # another size counts as missing and is fetched again
    assert {file.target for file in missing_files(tmp_path)} == {"image_proj/weights", "vae/weights"}
    download(tmp_path, progress=False)
    assert set(verify(tmp_path).values()) == {"good"}


@pytest.mark.parametrize("name", ["memoavatar/memo/image_proj/weights", "memoavatar/memo/image_proj/config.json"])
def test_a_wrong_checksum_is_an_error_and_the_file_does_not_appear(hub: Hub, tmp_path: Path, name: str) -> None:
    target = name.removeprefix("memoavatar/memo/")
    hub.damaged.add(name)
    with pytest.raises(DownloadError, match=f"{target} was damaged on its way"):
        download(tmp_path, progress=False)
    assert not (tmp_path / target).exists() and list((tmp_path / ".download").glob("image_proj*")) == []
    hub.damaged.clear()
    hub.requests.clear()
    download(tmp_path, progress=False)
    assert (name, None) in hub.fetched()  # from its beginning
    assert set(verify(tmp_path).values()) == {"good"}


def test_a_file_that_is_not_the_released_one_is_refused_before_it_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files["stabilityai/sd-vae-ft-mse/weights"] = b"something else"
    with pytest.raises(DownloadError, match="it is not the released file"):
        download(tmp_path, progress=False)
    assert hub.fetched() == []


def test_a_broken_line_keeps_what_came_and_the_next_call_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(getattr(file_download, "constants", file_download), "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.sends_at_most = 40_000
    with pytest.raises(DownloadError, match="image_proj/weights was interrupted after 40 kB of 100 kB.*Call again"):
        download(tmp_path, only=["memo"], progress=False)
    assert not (tmp_path / "image_proj" / "weights").exists()
    hub.sends_at_most = None
    download(tmp_path, only=["vae"], progress=False)  # leaves the other file alone
    (tmp_path / ".download" / "image_proj--weights.0123456789abcdef").write_bytes(b"of an earlier version")
    hub.requests.clear()
    download(tmp_path, only=["memo"], progress=False)
    assert hub.fetched() == [("memoavatar/memo/image_proj/weights", "bytes=40000-")]
    assert set(verify(tmp_path).values()) == {"good", "missing"}
    assert not (tmp_path / ".download").exists()


def test_a_killed_download_is_resumed_by_the_next_process(hub: Hub, tmp_path: Path) -> None:
    name = "memoavatar/memo/image_proj/weights"
    hub.files[name] = os.urandom(1024) * (25 * 1024)
    hub.sends_at_most, hub.stalls = 12 * 1024 * 1024, True
    script = textwrap.dedent("""
        import sys
        from memo_core.checkpoint import download as module
        file = module.ReleaseFile("memo", "image_proj/weights", "image_proj/weights", 25 << 20)
        module.RELEASE_FILES = (file,)
        print(module.download(sys.argv[1]))
    """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = os.environ | {"HF_ENDPOINT": hub.address, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size == CHUNK for path in tmp_path.glob(".download/*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "image_proj").exists()

    hub.sends_at_most, hub.stalls = None, False
    hub.requests.clear()
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert hub.fetched() == [(name, f"bytes={CHUNK}-")]
    assert (tmp_path / "image_proj" / "weights").read_bytes() == hub.files[name]


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_a_terminal_unless_unwanted(hub: Hub, tmp_path: Path, shown: bool) -> None:
    script = textwrap.dedent("""
        import sys
        from memo_core.checkpoint import download as module
        module.RELEASE_FILES = (module.ReleaseFile("memo", "image_proj/weights", "image_proj/weights", 100_000),)
        module.download(sys.argv[1], progress=sys.argv[2] == "True")
    """)
    terminal, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))  # a bar wants a width
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment |= {"HF_ENDPOINT": hub.address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path), str(shown)]
    subprocess.run(command, cwd=ROOT, env=environment, stderr=inner, check=True)
    os.write(inner, b"end")
    output = b""
    while not output.endswith(b"end"):
        output += os.read(terminal, 4096)
    os.close(inner)
    os.close(terminal)
    assert (b"image_proj/weights: 100%" in output) == shown


def test_a_file_that_grew_too_long_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    wanted = hub.files["stabilityai/sd-vae-ft-mse/weights"]
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / f"vae--weights.{hashlib.sha256(wanted).hexdigest()[:16]}").write_bytes(wanted + b"more")
    download(tmp_path, only=["vae"], progress=False)
    assert (tmp_path / "vae" / "weights").read_bytes() == wanted


def test_too_little_room_is_seen_before_the_first_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 90_000, 90_000))
    with pytest.raises(DownloadError, match=r"155 kB are to be fetched.*only 90 kB are free"):
        download(tmp_path, progress=False)
    assert hub.fetched() == []
    download(tmp_path, only=["vae"], progress=False)  # this much there is


def test_a_folder_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot write to"):
        download(tmp_path / "file" / "checkpoint", progress=False)


def test_a_file_the_hub_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    del hub.files["memoavatar/memo/image_proj/weights"]
    with pytest.raises(DownloadError, match="image_proj/weights of memoavatar/memo"):
        download(tmp_path, progress=False)
    assert hub.fetched() == []


def test_without_network_the_error_comes_soon_and_tells_how_to_do_it_by_hand(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    start = time.monotonic()
    with pytest.raises(DownloadError) as error:
        download(tmp_path / "checkpoint", only=["memo", "face"], progress=False)
    assert time.monotonic() - start < 60  # late 0.x versions of the hub package ask again for 23 s
    text = str(error.value)
    assert "/stabilityai/" not in text and "NOT for commercial use" in text
    for file in missing_files(tmp_path / "checkpoint", only=["memo", "face"]):
        assert f"{hub.address}/{file.repository}/resolve/main/{file.name}\n" in text
        assert f"-> {tmp_path / 'checkpoint' / file.target} (" in text
    assert not (tmp_path / "checkpoint").exists()


def test_offline_mode_is_respected(hub: Hub, tmp_path: Path) -> None:
    script = "import sys; from memo_core.checkpoint.download import download; download(sys.argv[1])"
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "DownloadError" in result.stderr and f"23 files (13.4 GB) are missing in {tmp_path}" in result.stderr
    assert hub.requests == []


def test_a_damaged_record_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "memo_download.json").write_text("{")
    with pytest.raises(DownloadError, match=r"memo_download\.json"):
        missing_files(tmp_path)


# The real table


def test_the_release_names_every_file_a_checkpoint_needs(memo_tiny: Path) -> None:
    targets = [file.target for file in RELEASE_FILES]
    assert len(set(targets)) == len(targets)
    required = {file.target for file in RELEASE_FILES if COMPONENTS[file.component].required}
    present = {path.relative_to(memo_tiny).as_posix() for path in memo_tiny.rglob("*") if path.is_file()}
    assert required <= present  # the fixture is a complete checkpoint in this layout
    assert {f"misc/face_analysis/models/{name}.onnx" for name in ("scrfd_10g_bnkps", "glintr100")} <= set(targets)
    sizes = {component: sum(f.size for f in RELEASE_FILES if f.component == component) for component in COMPONENTS}
    assert 10e9 < sizes["memo"] < 10.8e9  # 1,677 M and 857 M numbers of 4 bytes


def test_licences_are_told_in_plain_words() -> None:
    text = licences()
    for component in COMPONENTS:
        assert f"{component} (" in text
    assert "NOT for commercial use" in licences(["face"]) and "MIT" not in licences(["face"])
    assert "MIT" in licences(["vae"]) and "FunASR model licence" in licences(["emotion2vec"])
