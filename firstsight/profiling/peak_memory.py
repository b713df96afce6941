"""Measure peak memory: of torch's allocator on CUDA, of the whole process on the CPU, above an earlier level."""

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


class PeakMemory:
    """Measure the peak memory in bytes above what was in use when the object was created.

    On the CPU this is resident memory. The kernel's high-water mark is read and reset (Linux, proc(5): VmHWM,
    clear_refs), so that no peak is missed between two readings. Where it cannot be reset, a peak counts from the start
    of the process, or of the process that started it. Memory that glibc keeps for reuse after tensors were freed is
    first given back to the system: otherwise the next tensors would fill it, and their memory would not be seen.
    """

    def __init__(self, device: str):
        self._cuda = _cuda() if device == "cuda" else None
        self.reset()
        self._before = self._read()

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        else:
            with suppress(AttributeError):  # other C libraries have no such function
                ctypes.CDLL(None).malloc_trim(0)
            with suppress(OSError):  # a sandbox may forbid it
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak since the last `reset`, in bytes."""
        return max(0, self._read() - self._before)

    def _read(self) -> int:
        if self._cuda:
            return self._cuda.max_memory_allocated()
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        # Some sandboxes have no such line, and other systems no such file.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cuda() -> Any:
    import torch  # takes seconds, and exported models are measured without it

    return torch.cuda
