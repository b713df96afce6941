"""Average the gradients of several processes, once in each optimizer step.

DistributedDataParallel averages a gradient when autograd has computed it, which it does not learn of where a pass is
replayed as a CUDA graph. It also waits for each gradient in every process, with or without one.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, get_world_size

from firstsight.core.processes import in_any

# Bytes of gradients that are sent together.
_BUCKET = 64 << 20


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes, which must have the same parameters in the same order.

    A gradient that some processes lack is zero there; one that all lack stays None.
    """
    trained = [one for one in parameters if one.requires_grad]
    used = in_any([one.grad is not None for one in trained])
    for one in (one for one, somewhere in zip(trained, used, strict=True) if somewhere and one.grad is None):
        one.grad = torch.zeros_like(one)
    for bucket in _buckets([one.grad for one in trained if one.grad is not None]):
        together = torch.cat([one.reshape(-1) for one in bucket]).div_(get_world_size())
        all_reduce(together)
        parts = together.split([one.numel() for one in bucket])
        torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the gradients in lists of one dtype, each with at least a gradient and, but for a large one, 64 MiB."""
    for dtype in dict.fromkeys(one.dtype for one in gradients):
        bucket, size = [], 0
        for one in (one for one in gradients if one.dtype == dtype):
            if bucket and size + one.nbytes > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(one)
            size += one.nbytes
        yield bucket
