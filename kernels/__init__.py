"""The ops of a GPT, each a function with one name on every path: `kernels.attention(...)`, `kernels.rms_norm(...)`, ...

Their definition is `kernels.reference`; `kernels.use` picks the implementation and `kernels.explain` says which runs.
"""

import sys
import types

from kernels.dispatch import OPS, explain, public, use

__all__ = [*OPS, "explain", "use"]


class _Kernels(types.ModuleType):
    """An op and the module that holds its kernels have one name; the attribute stays the op when that is imported."""

    def __getattr__(self, name):
        if name not in OPS:
            raise AttributeError(f"module 'kernels' has no attribute {name!r}")
        return self.__dict__.setdefault(name, public(name))

    def __setattr__(self, name, value):
        if name not in OPS or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kernels
