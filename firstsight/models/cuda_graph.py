"""Record what is launched on a GPU as a CUDA graph, and go on as before where that fails."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def record(work: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Return a graph of what a function launches on the current GPU, which is recorded and not computed.

    Args:
        pool: the memory of other graphs, none of which is replayed while this one's results are used; None: its own.

    Raises:
        RuntimeError: memory does not suffice (`is_out_of_memory`), or the function waits for the CPU. After this, and
            what the function raises, the current stream, the state of random numbers and the allocator are as before.
    """
    device, pool = torch.cuda.current_device(), pool or torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[device]
    stream, random = torch.cuda.current_stream(), generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        # The threads of the data loader may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
    except Exception:
        # PyTorch 2.11 leaves the stream that recorded current, the generator drawing for the graph, and the allocator
        # as if it still recorded: it would never again free what it keeps when memory runs out.
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(random)
        with suppress(RuntimeError):
            graph.reset()
        with suppress(RuntimeError):  # "not recording", as it should be
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise
    return graph


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, is that the GPU's memory does not suffice.

    PyTorch has a class for its own allocator's alone, not for those of CUDA and cuBLAS.
    """
    while error is not None:
        said = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "ALLOC_FAILED" in said:
            return True
        error = error.__context__
    return False
