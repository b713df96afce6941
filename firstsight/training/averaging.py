"""Average the gradients of several processes, once in each optimizer step.

DistributedDataParallel averages a gradient when autograd has computed it, which it does not learn of where a pass is
replayed as a CUDA graph.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, broadcast, get_world_size
from torch.nn.parallel import DistributedDataParallel

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
        together = torch.cat([one.reshape(-1) for one in bucket]) if len(bucket) > 1 else bucket[0]
        all_reduce(together.div_(get_world_size()))
        if len(bucket) > 1:
            parts = together.split([one.numel() for one in bucket])
            torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])


@torch.no_grad()
def prepare_for_averaging(model: nn.Module) -> None:
    """Give all processes the trained weights of the first, and keep DistributedDataParallel from sending gradients.

    It is to wrap the model, and keeps room for all that it sends, as much as gradients take. It wants a parameter, and
    is left the smallest.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for one in trained.values():
        broadcast(one, 0)
    smallest = min(trained, key=lambda name: trained[name].numel())
    # All names of a weight: DistributedDataParallel looks in each module.
    names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names - {smallest}))


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
