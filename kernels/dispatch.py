"""Picks the implementation of every op in one place: "auto" takes what can run, a choice that cannot run raises.

No op has a Triton kernel yet, so "auto" finds the plain PyTorch reference everywhere and "triton" raises.
"""

OPS = ("attention", "layer_norm", "rms_norm", "rotary", "swiglu", "gelu", "squared_relu", "linear_cross_entropy")
CHOICES = ("auto", "triton", "reference")

_choice = "auto"


class use:
    """`kernels.use(choice)` sets the implementation for the process; in a `with` block, until its end."""

    def __init__(self, choice: str):
        global _choice
        if choice not in CHOICES:
            raise ValueError(f"kernels {choice!r} is none of: {', '.join(CHOICES)}")
        if choice == "triton":
            raise ValueError(f"kernels = triton: no Triton kernel exists for {', '.join(OPS)}; take auto or reference")
        self._before, _choice = _choice, choice

    def __enter__(self):
        return self

    def __exit__(self, *error):
        global _choice
        _choice = self._before


def explain() -> dict[str, tuple[str, str]]:
    """{op: (path, reason)}: which implementation a call takes now, and why."""
    reason = "chosen" if _choice == "reference" else "no Triton kernel exists"
    return {op: ("reference", reason) for op in OPS}
