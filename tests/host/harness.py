"""A real ComfyUI as a subprocess, spoken to by HTTP and WebSocket only.

host = Host(folder)                      # the pack is copied into <folder>/custom_nodes and the host started
run = host.wait(host.queue(prompt))      # prompt: the API format, {"1": {"class_type": ..., "inputs": {...}}}
run.executed, run.cached, run.outputs, run.error, run.progress, run.seconds
host.kill(); host.restart(); host.stop()
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import ProxyHandler, Request, build_opener

import websocket

ROOT = Path(__file__).parents[2]
_HTTP = build_opener(ProxyHandler({}))  # the host is on this machine: no proxy


def find_host() -> Path | None:
    """Folder of ComfyUI: $COMFYUI_PATH, else comfy-cli's default workspace; None where neither is.

    Raises FileNotFoundError where COMFYUI_PATH names a folder without ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named and not (Path(named) / "main.py").is_file():
        raise FileNotFoundError(f"COMFYUI_PATH={named!r} has no main.py; name the folder of ComfyUI, or unset it")
    folder = Path(named) if named else Path.home() / "comfy" / "ComfyUI"
    return folder.absolute() if (folder / "main.py").is_file() else None


def find_python(host: Path) -> Path | None:
    """The host's Python: $COMFYUI_PYTHON, else that of an environment in its folder, else this one if it will do."""
    named = os.environ.get("COMFYUI_PYTHON")
    inside = [host / env / exe for env in (".venv", "venv") for exe in ("bin/python", "Scripts/python.exe")]
    for python in [Path(named)] if named else inside:
        if python.is_file():
            return python.absolute()  # not resolved: a link into an environment is what makes it that environment's
    if named:
        raise FileNotFoundError(f"COMFYUI_PYTHON={named!r} is not a file; name the Python that runs ComfyUI")
    usable = all(find_spec(name) for name in ("torch", "torchsde", "aiohttp", "alembic", "comfyui_frontend_package"))
    return Path(sys.executable) if usable else None


def working_tree(*ignore: str) -> list[str]:
    """Paths, relative and with `/`, of the files here less those that .gitignore and the files `ignore` name.

    That is what git would list once everything is committed. git reads the patterns itself, with an empty repository of
    its own: a copy without .git has the same files.
    """
    with tempfile.TemporaryDirectory() as empty:
        subprocess.run(["git", "init", "--quiet", empty], check=True)
        command = ["git", f"--git-dir={empty}/.git", f"--work-tree={ROOT}", "ls-files", "-z", "--others"]
        command += ["--exclude-per-directory=.gitignore", *(f"--exclude-from={ROOT / name}" for name in ignore)]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return sorted(name for name in listed.stdout.decode().split("\0") if name)


def packed_files() -> list[str]:
    """Paths of what an installed pack consists of."""
    return working_tree(".comfyignore")


def copy_pack(folder: Path) -> None:
    """Put into `folder` what an installed pack consists of."""
    for name in packed_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


@dataclass(frozen=True, slots=True)
class Progress:
    """One progress message: when (seconds of `time.monotonic`), of which node, how far."""

    time: float
    node: str
    value: float
    max: float


@dataclass(frozen=True, slots=True)
class RunError:
    """What ended a run: the node and the exception that its user sees."""

    node: str
    node_type: str
    type: str
    message: str
    traceback: str


@dataclass(slots=True)
class Run:
    """What one prompt did."""

    prompt_id: str
    status: str  # success, error or interrupted
    executed: list[str]  # ids of nodes that ran, in order
    cached: list[str]  # ids of nodes whose outputs the host still had
    outputs: dict[str, dict[str, Any]]  # by node id, as the browser gets them
    error: RunError | None
    seconds: float  # from start to end
    node_seconds: dict[str, float]  # by node id, of those that ran
    progress: list[Progress] = field(repr=False)
    previews: list[tuple[float, str, bytes]] = field(repr=False)  # time, node id, encoded picture
    history: dict[str, Any] = field(repr=False)

    def files(self, node: str | None = None) -> list[dict[str, str]]:
        """Files among the outputs (of one node): filename, subfolder, type, which `Host.view(**file)` takes."""
        found = []
        for name, output in self.outputs.items():
            for values in output.values() if node in (None, name) else ():
                if isinstance(values, list):
                    found += [value for value in values if isinstance(value, dict) and "filename" in value]
        return [{key: file[key] for key in ("filename", "subfolder", "type")} for file in found]


class PromptRefused(Exception):
    """The host refused a prompt before running it; `errors` has by node id what its user reads."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.errors = {
            node: [f"{error['message']}: {error['details']}" for error in about["errors"]]
            for node, about in (answer.get("node_errors") or {}).items()
        }
        super().__init__(f"{answer['error']}: {self.errors}")


class HostDied(Exception):
    """The host ended, or never became ready; the message ends with its log."""


class Host:
    """A running ComfyUI with this pack in it.

    base: a folder of its own, with input, output, models, user, custom_nodes; it outlives `kill` and `restart`
    name: the pack's folder name in custom_nodes; None: without the pack
    packs: other packs, folder name -> {file name: text}
    args: further arguments of the host's main.py
    env: further environment variables
    """

    def __init__(
        self,
        base: Path,
        *,
        name: str | None = "comfyui-memo",
        packs: Mapping[str, Mapping[str, str]] = {},
        args: Sequence[str] = (),
        env: Mapping[str, str] = {},
    ) -> None:
        folder = find_host()
        python = folder and find_python(folder)
        if not folder or not python:
            raise FileNotFoundError("no ComfyUI host: set COMFYUI_PATH, and COMFYUI_PYTHON to the Python that runs it")
        self.folder, self.python, self.base, self.name = folder, python, base, name
        self.args, self.env = list(args), dict(env)
        self.client_id = uuid.uuid4().hex
        self._process: subprocess.Popen | None = None
        self._log = base / "host.log"
        self._log_start = 0
        for part in ("input", "output", "models", "user", "custom_nodes"):
            (base / part).mkdir(parents=True, exist_ok=True)
        if name is not None:
            copy_pack(base / "custom_nodes" / name)
        for pack, files in packs.items():
            for file, text in files.items():
                path = base / "custom_nodes" / pack / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        self.start()

    # --- Its life ---------------------------------------------------------------------------------------------------

    def start(self, timeout: float = 120) -> None:
        """Start the host and wait until it answers; raises HostDied."""
        self._spawn()
        deadline = time.monotonic() + timeout
        while not self._answers():
            if not self.alive and "address already in use" in self.log() and time.monotonic() < deadline:
                self._spawn()  # somebody took the port meanwhile
            elif not self.alive or time.monotonic() > deadline:
                self.kill()
                raise HostDied(f"ComfyUI did not start:\n{self.log()[-4000:]}")
            time.sleep(0.1)
        self._events: list[tuple[float, str, Any]] = []
        self._news = threading.Condition()
        self._connected = True
        socket_url = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        self._socket = websocket.create_connection(socket_url, enable_multithread=True)
        # Previews that say whose they are.
        self._socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        threading.Thread(target=self._listen, args=(self._socket,), daemon=True).start()

    def _spawn(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [str(self.python), "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes", *self.args]
        # The pack has to find its own modules, and its store in the user's folder.
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MEMO_STORE")}
        env = kept | self.env
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def _answers(self) -> bool:
        """Whether it, and not another host at its port, answers."""
        try:
            return str(self.base) in json.loads(self.get("/system_stats"))["system"]["argv"]
        except OSError:
            return False

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it at once (SIGKILL), as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End it as its user does."""
        if self.alive:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self.kill()

    def restart(self) -> None:
        """A new process on the same folders."""
        self.stop()
        self.start()

    def log(self) -> str:
        """What the host printed since its latest start."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def import_seconds(self) -> float:
        """Seconds that loading this pack took, as the host reports them to a tenth."""
        for seconds, folder in re.findall(r"^ *([\d.]+) seconds[^:\n]*: (.+)$", self.log(), re.MULTILINE):
            if Path(folder).name == self.name:
                return float(seconds)
        raise ValueError(f"the host's log names no import time of {self.name!r}:\n{self.log()[-4000:]}")

    # --- Its memory (Linux) -----------------------------------------------------------------------------------------

    def rss(self) -> int:
        """Bytes resident now."""
        return self._status("VmRSS")

    def peak_rss(self) -> int:
        """Bytes resident at most, since its start or `reset_peak_rss`."""
        return self._status("VmHWM")

    def reset_peak_rss(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def _status(self, key: str) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024

    # --- What it says -----------------------------------------------------------------------------------------------

    def get(self, path: str, **query: str) -> bytes:
        """Body of GET `path`; raises urllib.error.HTTPError."""
        return self._request(path + ("?" + urlencode(query) if query else ""))

    def post(self, path: str, body: Any) -> bytes:
        """Body of the answer to POST `path` with `body` as JSON; raises urllib.error.HTTPError."""
        return self._request(path, json.dumps(body).encode())

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        url = f"http://127.0.0.1:{self.port}{quote(path, safe='/?&=%+')}"
        with _HTTP.open(Request(url, data=body, headers={"Content-Type": "application/json"}), timeout=60) as answer:
            return answer.read()

    def object_info(self) -> dict[str, Any]:
        """Every node that the host offers, by id."""
        return json.loads(self.get("/object_info"))

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """A file of the host's output, input or temp folder."""
        return self.get("/view", filename=filename, subfolder=subfolder, type=type)

    # --- Its queue --------------------------------------------------------------------------------------------------

    def queue(self, prompt: Mapping[str, Any], client_id: str | None = None, **extra: Any) -> str:
        """Queue a prompt in the API format -> its id; raises PromptRefused.

        client_id: who hears of the run; only runs of the default, `self.client_id`, can be waited for
        extra: further keys of the request, e.g. extra_data={"extra_pnginfo": {"workflow": ...}}
        """
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": client_id or self.client_id, **extra})
        except HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRefused(json.loads(error.read())) from None
        return json.loads(answer)["prompt_id"]

    def interrupt(self) -> None:
        """What the cancel button does."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Forget cached outputs and unload the models."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.5)  # the host does it when its worker wakes up, and does not say when it has

    def wait(self, prompt_id: str, timeout: float = 300) -> Run:
        """Wait until a queued prompt has ended; raises TimeoutError, HostDied."""
        deadline = time.monotonic() + timeout
        self.wait_event("executing", prompt_id, timeout=deadline - time.monotonic(), node=None)
        history = json.loads(self.get(f"/history/{prompt_id}"))[prompt_id]
        return self._run(prompt_id, history)

    def wait_event(self, kind: str, prompt_id: str, timeout: float = 300, **values: Any) -> dict[str, Any]:
        """The first message of a prompt of this kind with these values, e.g. ("executing", id, node="3").

        Raises TimeoutError, HostDied.
        """
        deadline = time.monotonic() + timeout
        seen = 0
        with self._news:
            while True:
                for _, event, data in self._events[seen:]:
                    ours = event == kind and data.get("prompt_id") == prompt_id
                    if ours and all(key in data and data[key] == value for key, value in values.items()):
                        return data
                seen = len(self._events)
                if not self._connected:
                    raise HostDied(f"ComfyUI ended:\n{self.log()[-4000:]}")
                if not self._news.wait(deadline - time.monotonic()) and time.monotonic() > deadline:
                    raise TimeoutError(f"no {kind} {values} in {timeout:.0f} s:\n{self.log()[-4000:]}")

    def _listen(self, connection: websocket.WebSocket) -> None:
        while True:
            try:
                opcode, data = connection.recv_data()
            except (OSError, websocket.WebSocketException):
                opcode, data = websocket.ABNF.OPCODE_CLOSE, b""
            with self._news:
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    self._connected = False
                elif opcode == websocket.ABNF.OPCODE_TEXT:
                    message = json.loads(data)
                    self._events.append((time.monotonic(), message["type"], message["data"] or {}))
                elif int.from_bytes(data[:4], "big") == 4:  # a preview: length of its metadata, metadata, picture
                    size = int.from_bytes(data[4:8], "big")
                    about = json.loads(data[8 : 8 + size])
                    self._events.append((time.monotonic(), "preview", about | {"picture": data[8 + size :]}))
                self._news.notify_all()
                if not self._connected:
                    return

    def _run(self, prompt_id: str, history: dict[str, Any]) -> Run:
        with self._news:
            events = [event for event in self._events if event[2].get("prompt_id") == prompt_id]
        messages = dict(history["status"]["messages"])
        starts = [(when, data["node"]) for when, kind, data in events if kind == "executing"]
        node_seconds: dict[str, float] = {}
        for (when, node), (until, _) in zip(starts, starts[1:]):
            node_seconds[node] = node_seconds.get(node, 0.0) + until - when
        error = None
        status = history["status"]["status_str"]
        if "execution_error" in messages:
            about = messages["execution_error"]
            error = RunError(
                node=about["node_id"],
                node_type=about["node_type"],
                type=about["exception_type"],
                message=about["exception_message"].strip(),
                traceback="".join(about["traceback"]),
            )
        elif "execution_interrupted" in messages:
            status = "interrupted"
        return Run(
            prompt_id=prompt_id,
            status=status,
            executed=list(node_seconds),
            cached=messages["execution_cached"]["nodes"],
            outputs=history["outputs"],
            error=error,
            seconds=events[-1][0] - events[0][0],
            node_seconds=node_seconds,
            progress=[
                Progress(when, data["node"], data["value"], data["max"])
                for when, kind, data in events
                if kind == "progress"
            ],
            previews=[(when, data["node_id"], data["picture"]) for when, kind, data in events if kind == "preview"],
            history=history,
        )
