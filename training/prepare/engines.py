"""Runs a stage over many rows: in processes of this machine, or through Ray Data on a cluster."""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .rows import PrepareError, Row
from .settings import Settings
from .worker import LOG, Worker

Engine = Callable[[str, list[Row], Settings], Iterator[tuple[str, list[Row]]]]
"""(stage, rows, settings) -> (id of a row, what became of it), in any order, every row once."""


class Local:
    """`jobs` worker processes on this machine; `limit` seconds for each row. Use as a context manager."""

    def __init__(self, out: Path, jobs: int, limit: float):
        self.jobs, self.limit = jobs, limit
        self._all = [Worker(out / LOG, max(1, (os.cpu_count() or 1) // jobs)) for _ in range(jobs)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.close()

    def __call__(self, stage: str, rows: list[Row], settings: Settings) -> Iterator[tuple[str, list[Row]]]:
        def run(row: Row) -> list[Row]:
            worker = self._idle.get()
            try:
                return worker.call(stage, row, settings, self.limit)
            finally:
                self._idle.put(worker)

        threads = ThreadPoolExecutor(self.jobs)
        try:
            running = {threads.submit(run, row): row.id for row in rows}
            for done in as_completed(running):
                yield running.pop(done), done.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


class OnRay:
    """Ray Data: a task for each row, on the cluster that `address` names, or one started here. RAW_DIR, OUT_DIR and the
    models have to be at the same paths on every node, and `training` has to be importable there: start Ray's nodes with
    a checkout in PYTHONPATH, or pass runtime_env={"working_dir": ...} or {"env_vars": {"PYTHONPATH": ...}} here.

    Each Ray worker keeps a worker process of its own, so that a crash costs one row there, too.
    """

    def __init__(self, out: Path, limit: float, address: str | None = None, gpus: float = 0.0, **init: Any):
        try:
            import ray
            import ray.data  # wants pandas and pyarrow
        except ImportError as error:
            raise PrepareError(f'--engine ray needs Ray Data: pip install "comfyui-memo[cluster]" ({error})') from error
        self.out, self.limit, self.gpus = out, limit, gpus
        ray.init(address, log_to_driver=False, **init)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # any number: a block is a row, and a lost one is said below

    def __enter__(self) -> OnRay:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def __call__(self, stage: str, rows: list[Row], settings: Settings) -> Iterator[tuple[str, list[Row]]]:
        import ray

        # Text, because columns of a table have one type, and None, lists and names in any encoding do not.
        items = [{"row": json.dumps(row.to_json())} for row in rows]
        out, limit = str(self.out), self.limit

        def run(item: dict[str, str]) -> list[dict[str, str]]:
            row = Row.from_json(json.loads(item["row"]))
            results = _own_worker(out).call(stage, row, settings, limit)
            return [{"id": row.id, "rows": json.dumps([result.to_json() for result in results])}]

        data = ray.data.from_items(items, override_num_blocks=len(items)).flat_map(run, num_cpus=1, num_gpus=self.gpus)
        missing = {row.id: row for row in rows}
        for item in data.iter_rows():
            del missing[item["id"]]
            yield item["id"], [Row.from_json(values) for values in json.loads(item["rows"])]
        for row in missing.values():
            yield row.id, [row.fail(stage, "worker died", "Ray lost it", error=True)]


def _own_worker(out: str) -> Worker:
    """This Ray worker's; another one when Ray has given it another GPU, which a running process would not see."""
    key = out, os.environ.get("CUDA_VISIBLE_DEVICES")
    if key not in _own:
        for worker in _own.values():
            worker.close()
        _own.clear()
        _own[key] = Worker(Path(out, LOG))
    return _own[key]


_own: dict[tuple[str, str | None], Worker] = {}
