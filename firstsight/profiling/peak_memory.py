"""Peak memory: of torch's allocator on CUDA, of the whole process on the CPU, above what was there before."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Bytes above those held when this was made.

    On the CPU that is resident memory, with what libraries keep for reuse; the kernel's own high-water mark is read
    and reset (Linux, proc(5): VmHWM, clear_refs), so that no peak falls between two looks. Where it cannot be reset, a
    peak is that since the process began, or of what started it.
    """

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self.reset()
        self._before = self._read()

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # a sandbox may forbid it
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The highest since `reset`."""
        return max(0, self._read() - self._before)

    def _read(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        # Some sandboxes have no such line, and other systems no such file.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
