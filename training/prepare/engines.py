"""Runs a stage over many rows: in processes of this machine, or through Ray Data on a cluster."""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from .rows import PrepareError, Row, Work
from .settings import Settings
from .worker import LOG, Worker

AT_ONCE = 4096  # rows that are handed to Ray Data together
Engine = Callable[[Work, Iterable[Row], Settings], Iterator[tuple[str, list[Row]]]]
"""(stages, rows, settings) -> (id of a row, what became of it), in any order, every row once. Rows are asked for as
there is room for them, so that only those at work are in memory."""


class Local:
    """`jobs` worker processes on this machine; `limit` seconds for each row. With the device "cuda" they share its GPUs
    evenly, each worker seeing one. Use as a context manager.
    """

    def __init__(self, out: Path, jobs: int, limit: float, device: str = "cpu"):
        self.jobs, self.limit = jobs, limit
        threads, gpus = max(1, (os.cpu_count() or 1) // jobs), visible_gpus() if device == "cuda" else []
        self._all = [Worker(out / LOG, threads, gpus[n % len(gpus)] if gpus else None) for n in range(jobs)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.close()

    def __call__(self, work: Work, rows: Iterable[Row], settings: Settings) -> Iterator[tuple[str, list[Row]]]:
        def run(row: Row) -> list[Row]:
            worker = self._idle.get()
            try:
                return worker.call(work, row, settings, self.limit)
            finally:
                self._idle.put(worker)

        threads, rows, running = ThreadPoolExecutor(self.jobs), iter(rows), {}
        try:
            while True:
                for row in islice(rows, 2 * self.jobs - len(running)):
                    running[threads.submit(run, row)] = row.id
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def visible_gpus() -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them, those that it lists if it is set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


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

    def __call__(self, work: Work, rows: Iterable[Row], settings: Settings) -> Iterator[tuple[str, list[Row]]]:
        rows = iter(rows)
        while some := list(islice(rows, AT_ONCE)):
            yield from self._run(work, some, settings)

    def gpus_for(self, work: Work, settings: Settings) -> float:
        """What a task of these stages reserves: nothing where none of them computes on a GPU."""
        return self.gpus if settings.uses_gpu(work) else 0.0

    def _run(self, work: Work, rows: list[Row], settings: Settings) -> Iterator[tuple[str, list[Row]]]:
        import ray

        # Text, because columns of a table have one type, and None, lists and names in any encoding do not.
        items = [{"row": json.dumps(row.to_json())} for row in rows]
        out, limit, work = str(self.out), self.limit, dict(work)

        def run(item: dict[str, str]) -> list[dict[str, str]]:
            row = Row.from_json(json.loads(item["row"]))
            results = _own_worker(out).call(work, row, settings, limit)
            return [{"id": row.id, "rows": json.dumps([result.to_json() for result in results])}]

        data = ray.data.from_items(items, override_num_blocks=len(items))
        data = data.flat_map(run, num_cpus=1, num_gpus=self.gpus_for(work, settings))
        missing = {row.id: row for row in rows}
        for item in data.iter_rows():
            del missing[item["id"]]
            yield item["id"], [Row.from_json(values) for values in json.loads(item["rows"])]
        for row in missing.values():
            yield row.id, [row.fail(next(iter(work), "faces"), "worker died", "Ray lost it", error=True).finish(work)]


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
