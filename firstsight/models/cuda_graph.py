"""Record what is launched on a GPU as a CUDA graph, and go on as before where that fails."""

from collections.abc import Callable
from typing import Any

import torch


def record(work: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Return a graph of what a function launches on the current GPU, which is recorded and not computed.

    Args:
        pool: the memory of other graphs, none of which is replayed while this one's results are used; None: its own.

    Raises:
        RuntimeError: memory does not suffice, or the function waits for the CPU. The current stream and the state of
            random numbers are what they were.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    stream, random = torch.cuda.current_stream(), generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        # The threads of the data loader may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
    except RuntimeError:
        # PyTorch 2.11 leaves the stream that recorded current, and the generator drawing for the graph.
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(random)
        raise
    return graph
