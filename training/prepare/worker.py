"""A process that runs stages, one row at a time: requests come as lines of JSON, and so do answers, after the name of
each stage that begins or goes on.

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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .rows import Row, Work, failed
from .settings import Settings

LOG = "workers.log"


class Worker:
    """The parent's side; the process starts with the first call, and again after it died.

    Args:
        log: file to which the process writes what its libraries say, and the traces of errors.
        threads: that the process's libraries may use.
        gpu: the one that it sees, as CUDA_VISIBLE_DEVICES names it; None leaves that as it is.
    """

    def __init__(self, log: Path, threads: int = 1, gpu: str | None = None):
        self.log, self.threads, self.gpu = log, threads, gpu
        self._process: subprocess.Popen | None = None

    def call(self, work: Work, row: Row, settings: Settings, limit: float) -> list[Row]:
        """What the stages make of a row; a row failed at the last of them that began if the process dies, or says
        nothing for more than `limit` seconds.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        process, expired = self._process, threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        stage, answer = next(iter(work), "faces"), b""
        timer = threading.Timer(limit, expire)
        timer.start()
        try:
            request = {"work": work, "row": row.to_json(), "settings": asdict(settings), "limit": limit}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            while (answer := process.stdout.readline()).endswith(b"\n"):
                said = json.loads(answer)
                if isinstance(said, list):
                    return [Row.from_json(values) for values in said]
                stage = said
                timer.cancel()
                timer = threading.Timer(limit, expire)
                timer.start()
        except OSError:
            pass  # it died: no answer
        finally:
            timer.cancel()
        self.close()
        if expired.is_set():
            row = row.fail(stage, "time limit", f"more than --time-limit {limit:g} s", error=True)
        else:
            row = row.fail(stage, "worker died", f"exit code {process.returncode}, see {LOG}", error=True)
        return [row.finish(work)]

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
        environment |= {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}
        environment |= {"OMP_NUM_THREADS": threads, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training.prepare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )


def apply(work: Work, row: Row, settings: Settings, begin: Callable[[str], None] = lambda stage: None) -> list[Row]:
    """Runs stages in this process; whatever they raise becomes the row's failure.

    Args:
        work: scenes with faces, faces, or any of those after them, in order.
        begin: told which stage begins, or goes on.
    """
    stage = next(iter(work), "faces")
    try:
        begin(stage)
        if stage == "scenes":
            from .scenes import split

            rows = split(row, settings, alive=lambda: begin("scenes"))
        elif "faces" in work:
            from .faces import crop

            rows = crop(row, settings)
        else:
            from .clip import measure

            return measure(row, work, settings, begin)
    except Exception as error:
        rows = [failed(row, stage, error)]
    return [result.finish(work) for result in rows]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the answers

    def answer(said: object) -> None:
        answers.write(json.dumps(said).encode() + b"\n")
        answers.flush()

    for line in sys.stdin.buffer:
        request = json.loads(line)
        row, settings, limit = Row.from_json(request["row"]), Settings.from_json(request["settings"]), request["limit"]

        def begin(stage: str, limit: float = limit) -> None:
            if hasattr(signal, "alarm"):  # ends this process where the parent, which should have, is gone
                signal.alarm(math.ceil(limit) + 5)
            answer(stage)

        rows = apply(request["work"], row, settings, begin)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        answer([result.to_json() for result in rows])


if __name__ == "__main__":
    main()
