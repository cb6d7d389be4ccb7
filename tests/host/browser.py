"""A headless Chromium with the host's own frontend in it, driven over the DevTools protocol.

with Page(find_chromium(), host.port, host.base, profile) as page:
    page.open_workflow(graph)           # the UI format
    page.run("app.graph.nodes.length")  # JavaScript, awaited -> its value
    page.picture()                      # of the graph -> PIL image
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import websocket
from PIL import Image

from .harness import Host

_HTTP = build_opener(ProxyHandler({}))  # the browser is on this machine: no proxy
# A page without its first-visit dialogs and extras, drawn in full at any zoom.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Locale": "en",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.TextareaWidget.FontSize": 13,
    "Comfy.Workflow.Persist": False,
    "Comfy.Workflow.WarnBlueprintOverwrite": False,
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.NodeBadge.NodeLifeCycleBadgeMode": "None",
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0,
}


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome: $CHROMIUM, else the first on the PATH."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


class ScriptError(Exception):
    """What the page threw."""


class Page:
    """One tab with ComfyUI in it, ready for use.

    base: the host's folder; its first user gets SETTINGS
    folder: an empty one, for the browser's profile
    """

    def __init__(self, chromium: str, port: int, base: Path, folder: Path, width: int = 1600, height: int = 900):
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS))
        self.said: deque[str] = deque(maxlen=1000)  # errors on the console and exceptions that nobody caught
        self._number = 0
        command = [chromium, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
        command += ["--no-first-run", "--disable-gpu", "--mute-audio", "--no-proxy-server", "--hide-scrollbars"]
        command += ["--disable-dev-shm-usage", "--remote-allow-origins=*", f"--window-size={width},{height}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses its sandbox to root
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen([*command, "about:blank"], stdout=log, stderr=log)
        try:
            self._connect(folder, time.monotonic() + 60)
            for domain in ("Page", "Runtime"):
                self.command(f"{domain}.enable")
            self.resize(width, height)
            self._url = f"http://127.0.0.1:{port}/"
            self.reload()
        except BaseException:
            self.close()
            raise

    def _connect(self, folder: Path, deadline: float) -> None:
        port_file = folder / "DevToolsActivePort"
        while True:
            try:
                port = int(port_file.read_text().split()[0])
                targets = json.loads(_HTTP.open(f"http://127.0.0.1:{port}/json", timeout=10).read())
                address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
                break
            except (OSError, ValueError, IndexError, StopIteration):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise TimeoutError(f"Chromium did not start: {(folder / 'chromium.log').read_text()}") from None
                time.sleep(0.1)
        self._socket = websocket.create_connection(address, timeout=60)

    def reload(self) -> None:
        """Open ComfyUI anew."""
        self.command("Page.navigate", url="about:blank")
        self.command("Page.navigate", url=self._url)
        self.wait_for("window.app?.graph && app.extensionManager && !document.querySelector('#splash-loader')", 120)
        self.wait_for("Object.keys(LiteGraph.registered_node_types).some(name => name.startsWith('MEMO_'))", 120)
        time.sleep(1)  # the frontend opens its own first graph a little later

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def command(self, method: str, /, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol -> its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("method") == "Runtime.exceptionThrown":
                about = message["params"]["exceptionDetails"]
                self.said.append(about.get("exception", {}).get("description") or about["text"])
            elif message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
                values = [arg.get("value", arg.get("description")) for arg in message["params"]["args"]]
                self.said.append(" ".join(map(str, values)))
            elif message.get("id") == self._number:
                if "error" in message:
                    raise ScriptError(f"{method}: {message['error']['message']}")
                return message["result"]

    def run(self, script: str, timeout: float = 60, **values: Any) -> Any:
        """Value of a JavaScript expression, which may await; `values` are its variables.

        Raises ScriptError with what the page threw.
        """
        names, given = ", ".join(values), ", ".join(json.dumps(value) for value in values.values())
        self._socket.settimeout(timeout)
        answer = self.command(
            "Runtime.evaluate",
            expression=f"(async ({names}) => ({script}))({given})",
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            about = answer["exceptionDetails"]
            raise ScriptError(about.get("exception", {}).get("description") or about["text"])
        return answer["result"].get("value")

    def wait_for(self, condition: str, timeout: float = 60, **values: Any) -> None:
        """Wait until a JavaScript expression is true; raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                if self.run(condition, **values):
                    return
            except ScriptError:  # the page is being replaced
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {timeout:.0f} s: {condition}; the page says {list(self.said)}")
            time.sleep(0.1)

    def open_workflow(self, graph: dict[str, Any]) -> None:
        """Open a workflow in the UI format, as its user does."""
        self.run("app.loadGraphData(graph)", graph=graph)
        self.wait_for("app.graph.nodes.length === count", count=len(graph["nodes"]))

    def press_run(self, host: Host, timeout: float) -> dict[str, Any]:
        """Queue the open workflow and wait for its end -> the run's history; raises TimeoutError, ScriptError."""
        known = set(json.loads(host.get("/history")))
        deadline = time.monotonic() + timeout
        self.run("app.queuePrompt(0, 1)")
        while not (ended := json.loads(host.get("/history")).keys() - known):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ended within {timeout:.0f} s:\n{host.log()[-2000:]}")
            time.sleep(0.3)
        history = json.loads(host.get("/history"))[ended.pop()]
        if history["status"]["status_str"] != "success":
            raise ScriptError(f"the run failed: {history['status']}")
        return history

    def resize(self, width: int, height: int) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def picture(self, edge: int = 30) -> Image.Image:
        """The whole graph at full size with an edge around it, without the frontend's panels."""
        left, top, right, bottom = self.run(
            "(boxes => [Math.min(...boxes.map(box => box[0])), Math.min(...boxes.map(box => box[1])), "
            "Math.max(...boxes.map(box => box[0] + box[2])), Math.max(...boxes.map(box => box[1] + box[3]))])"
            "([...app.graph.nodes.map(node => [...node.boundingRect]), "
            "...app.graph.groups.map(group => [...group.pos, ...group.size])])"
        )
        self.resize(round(right - left + 2 * edge), round(bottom - top + 2 * edge))
        self.run("app.extensionManager.focusMode = true")
        hidden = ".comfy-menu-hamburger, video::-webkit-media-controls {display: none !important}"
        style = f"<style>{hidden}</style>"
        self.run("document.head.insertAdjacentHTML('beforeend', style)", style=style)
        time.sleep(0.5)
        self.run(
            "(app.canvas.ds.scale = 1, app.canvas.ds.offset[0] = x, app.canvas.ds.offset[1] = y, "
            "app.canvas.setDirty(true, true))",
            x=edge - left,
            y=edge - top,
        )
        time.sleep(1)
        shot = self.command("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")
