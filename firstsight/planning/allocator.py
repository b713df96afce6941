"""Add up the memory that PyTorch's allocator takes from CUDA for tensors that come and go.

It takes memory in segments: 2 MiB for a tensor of up to 1 MiB, 20 MiB for one below 10 MiB, else the tensor's size,
rounded up to 2 MiB. A tensor lies in the smallest free piece that holds it, and what is left of the piece is free for
others. Pieces of two segments are never joined, and a free segment goes back to CUDA only when memory runs out
(c10/cuda/CUDACachingAllocator.cpp). So where tensors grow, the segments of the smaller ones stay beside the new ones.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

MIB = 1 << 20


def reserved(moments: Iterable[Sequence[float]]) -> int:
    """Return the bytes of all segments after moments that follow each other.

    Each moment is the bytes of tensors that are alive at once, in the order in which they are allocated. What is alive
    in two moments must be in both.
    """
    segments: list[int] = []
    for tensors in moments:
        free = sorted(segments)
        for size in filter(None, map(round, tensors)):
            place = bisect_left(free, size)
            if place == len(free):
                segments.append(segment_bytes(size))
                piece = segments[-1]
            else:
                piece = free.pop(place)
            # A smaller rest is not split off.
            if piece - size > MIB:
                insort(free, piece - size)
    return sum(segments)


def segment_bytes(size: int) -> int:
    """Return the bytes of the segment that is taken from CUDA for a tensor of `size` bytes."""
    if size < 10 * MIB:
        return 2 * MIB if size <= MIB else 20 * MIB
    return -(-size // (2 * MIB)) * 2 * MIB
