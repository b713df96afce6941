"""A process in which Triton's kernels are interpreted, on the CPU; the choice is made when Triton is imported."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Call a function with its arguments in such a process, of one thread."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
