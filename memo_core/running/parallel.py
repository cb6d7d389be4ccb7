"""Independent work on several threads of a processor: small operations are better shared out whole than cut up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import lru_cache
from typing import TypeVar

import torch

Result = TypeVar("Result")


def run_in_parallel(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Runs tasks at the same time, each with its share of torch's threads; one after the other if there are too few.

    Modes of torch that belong to a thread (inference mode, gradients) and context variables are those of the caller;
    others, as profilers and dispatch modes, do not see the tasks.
    """
    threads = torch.get_num_threads()
    if threads < len(tasks) or len(tasks) == 1:
        return [task() for task in tasks]
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(task: Callable[[], Result]) -> Result:
        torch.set_num_threads(threads // len(tasks))  # of this thread; for later ones it is set right below
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return task()

    try:
        pool = _pool(len(tasks))
        return [future.result() for future in [pool.submit(copy_context().run, run, task) for task in tasks]]
    finally:
        torch.set_num_threads(threads)


@lru_cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="memo")
