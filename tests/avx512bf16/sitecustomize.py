"""Let bitsandbytes believe that this processor has AVX-512-BF16, as if its own check had said so.

With this folder first on PYTHONPATH, Python runs this file in every process:

    PYTHONPATH=tests/avx512bf16 python -m pytest

bitsandbytes then repacks 4-bit weights, and looks for a kernel of the hub, as on such a processor; only the products
of repacked weights, which are that processor's own instructions, cannot be computed elsewhere.
"""

import importlib.abc
import importlib.machinery
import sys

_MODULE = "bitsandbytes.functional"


class _Patched(importlib.abc.Loader):
    """The module's own loader, and one function replaced after it."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        module.has_avx512bf16 = lambda: True


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        spec.loader = _Patched(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
