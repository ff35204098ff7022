"""Runs independent jobs, in this process or in several with one thread each. Independent of any task."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

T = TypeVar("T")


def run_jobs(function: Callable[..., T], jobs: Sequence[tuple], workers: int) -> Iterator[tuple[int, T]]:
    """Yield (number, function(*job)) as each job ends. With several workers `function` and the jobs are pickled."""
    if workers == 1:
        for number, job in enumerate(jobs):
            yield number, function(*job)
        return
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, fresh, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        numbers = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
