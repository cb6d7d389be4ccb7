"""A process that runs stages, one row at a time: requests come as lines of JSON, and so do answers.

A video can bring down a decoder, or keep it busy for ever. Here that ends one process, and costs one row.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path

from .rows import Drop, Row
from .settings import Settings

LOG = "workers.log"


class Worker:
    """The parent's side; the process starts with the first call, and again after it died.

    Args:
        log: file to which the process writes what its libraries say, and the traces of errors.
        threads: that the process's libraries may use.
    """

    def __init__(self, log: Path, threads: int = 1):
        self.log, self.threads = log, threads
        self._process: subprocess.Popen | None = None

    def call(self, stage: str, row: Row, settings: Settings, limit: float) -> list[Row]:
        """What the stage makes of a row; a failed row if the process dies or takes more than `limit` seconds."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        process, expired = self._process, threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(limit, expire)
        timer.start()
        answer = b""
        try:
            request = {"stage": stage, "row": row.to_json(), "settings": asdict(settings), "limit": limit}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            pass  # it died: no answer
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return [Row.from_json(values) for values in json.loads(answer)]
        self.close()
        if expired.is_set():
            return [row.fail(stage, "time limit", f"more than --time-limit {limit:g} s", error=True)]
        return [row.fail(stage, "worker died", f"exit code {process.returncode}, see {LOG}", error=True)]

    def close(self) -> None:
        """Ends the process, at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _start(self) -> None:
        self.close()
        threads = str(self.threads)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment |= {"OMP_NUM_THREADS": threads, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training.prepare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )


def apply(stage: str, row: Row, settings: Settings) -> list[Row]:
    """Runs a stage in this process; whatever it raises becomes the row's failure."""
    try:
        return _stage(stage)(row, settings)
    except Drop as drop:
        return [row.fail(stage, drop.cause, drop.detail)]
    except Exception as error:
        traceback.print_exc()
        return [row.fail(stage, "error", f"{type(error).__name__}: {error}"[:500], error=True)]


def _stage(name: str):
    if name == "scenes":
        from .scenes import split as stage
    elif name == "faces":
        from .faces import crop as stage
    elif name == "quality":
        from .quality import assess as stage
    elif name == "sync":
        from .sync import measure as stage
    else:
        from .encode import encode as stage
    return stage


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the answers
    for line in sys.stdin.buffer:
        request = json.loads(line)
        row, settings = Row.from_json(request["row"]), Settings.from_json(request["settings"])
        if hasattr(signal, "alarm"):  # ends this process where the parent, which should have, is gone
            signal.alarm(math.ceil(request["limit"]) + 5)
        rows = apply(request["stage"], row, settings)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        answers.write(json.dumps([result.to_json() for result in rows]).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
