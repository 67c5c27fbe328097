"""The ops of a GPT, each a function with one name on every path: `kernels.attention(...)`, `kernels.rms_norm(...)`, ...

Their definition is `kernels.reference`; `kernels.use` picks the implementation and `kernels.explain` says which runs.
"""

from kernels.dispatch import OPS, explain, use

__all__ = [*OPS, "explain", "use"]


def __getattr__(name):
    if name not in OPS:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    from kernels import reference

    return globals().setdefault(name, getattr(reference, name))
