"""Count the bytes of tensors that are alive at once, and replay their allocation by the rules of CUDA's allocator."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from firstsight.planning.allocator import MIB, segment_bytes


class LiveBytes(TorchDispatchMode):
    """Record the tensors that are made in this context, on any device, without the workspace of single kernels.

    Tensors that existed before do not count, and tensors that share memory count once. `kernels` are Python functions
    by the name of the operation that they replace, whose tensors are to be seen.

    `peak` is the most bytes alive at once; `events` are (tensor, bytes) in order, with 0 bytes where it is freed.
    """

    def __init__(self, kernels: dict[str, Callable] | None = None):
        super().__init__()
        self.peak, self.events = 0, []
        self._kernels, self._alive = kernels or {}, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        parts = self._kernels.get(operation.name().split(".")[0])
        if parts is None and operation._can_decompose():
            parts = operation.decompose
        if parts is not None:
            with self:
                return parts(*args, **kwargs)
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        results = operation(*args, **kwargs)
        for one in tree_leaves(results):
            if isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in given | self._alive.keys():
                self._allocated(one.untyped_storage())
        return results

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        self._alive[storage._cdata] = storage.nbytes()
        self.events.append((storage._cdata, storage.nbytes()))
        self.peak = max(self.peak, sum(self._alive.values()))
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, place: int) -> None:
        self.events.append((place, 0))
        del self._alive[place]


def replayed(events: list[tuple[int, int]], scale: float = 1) -> int:
    """Return the bytes of the segments that these events take, with tensors `scale` times as large."""
    segments: list[list[list]] = []  # of pieces [bytes, tensor or None]
    for tensor, size in events:
        size = round(size * scale)
        if size:
            free = [(piece[0], pieces, at) for pieces in segments for at, piece in enumerate(pieces) if not piece[1]]
            if fitting := [one for one in free if one[0] >= size]:
                found, pieces, at = min(fitting, key=lambda one: one[0])
            else:
                found, pieces, at = segment_bytes(size), [[segment_bytes(size), None]], 0
                segments.append(pieces)
            split = found - size > MIB
            pieces[at : at + 1] = [[size, tensor], [found - size, None]] if split else [[found, tensor]]
        for pieces in () if size else segments:
            for piece in pieces:
                piece[1] = None if piece[1] == tensor else piece[1]
            for at in reversed(range(len(pieces) - 1)):
                if not pieces[at][1] and not pieces[at + 1][1]:
                    pieces[at : at + 2] = [[pieces[at][0] + pieces[at + 1][0], None]]
    return sum(piece[0] for pieces in segments for piece in pieces)
