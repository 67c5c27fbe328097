"""Picks the implementation of every op in one place: "auto" takes what can run, a choice that cannot run raises.

"auto" takes Triton for CUDA tensors where it can run, the PyTorch reference elsewhere. "triton" asks for it, and takes
CPU tensors too where TRITON_INTERPRET=1 was set before Triton was imported.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
from pathlib import Path

OPS = ("attention", "decode_attention", "split_heads", "rotary", "layer_norm", "rms_norm", "swiglu", "gelu",
       "squared_relu", "linear_cross_entropy", "quantized_linear")
CHOICES = ("auto", "triton", "reference")
LEAST_CAPABILITY = (8, 0)
"""Of a GPU: Ampere, the first with bfloat16."""

_choice = "auto"
_loaded = {op: [] for op in OPS}
"""{op: its Triton implementation, once it was picked}: a list for each, that a caller being compiled reads it anew."""


class use:
    """`kernels.use(choice)` sets the implementation for the process; in a `with` block, until its end."""

    def __init__(self, choice: str):
        global _choice
        if choice not in CHOICES:
            raise ValueError(f"kernels {choice!r} is none of: {', '.join(CHOICES)}")
        if choice == "triton" and (problem := obstacle(_device())):
            raise ValueError(f"kernels = triton: {problem}; take auto or reference")
        self._before, _choice = _choice, choice

    def __enter__(self):
        return self

    def __exit__(self, *error):
        global _choice
        _choice = self._before


def explain() -> dict[str, tuple[str, str]]:
    """{op: (path, reason)}: which implementation a call takes now, and why; with a GPU, for tensors on it."""
    return {op: path(op, _device()) for op in OPS}


def path(op: str, device: str) -> tuple[str, str]:
    """("triton" | "reference", why) of an op on a type of device. ValueError where the choice cannot run."""
    if _choice == "reference":
        return "reference", "chosen"
    problem = obstacle(device)
    if _choice == "triton":
        if problem:
            raise ValueError(f"kernels.{op}: {problem}; move the tensors to a GPU, or take kernels.use('auto')")
        return "triton", "chosen"
    if problem is None and device == "cpu":
        problem = "the interpreter runs only where triton is chosen"
    return ("reference", problem) if problem else ("triton", "a GPU that runs it")


@functools.cache
def obstacle(device: str) -> str | None:
    """Why Triton cannot run on tensors of a type of device; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device == "cpu" else "TRITON_INTERPRET=1 is set, so Triton takes CPU tensors"
    if device != "cuda":
        return f"Triton does not run on {device} tensors (TRITON_INTERPRET=1 interprets it on the CPU)"
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, less than {LEAST_CAPABILITY}"
    return None


def _device():
    """The type of device that an explanation is about."""
    if importlib.util.find_spec("torch") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def public(op: str):
    """The op as callers see it: the reference's signature and docstring, and the implementation picked at each call."""
    import torch

    from kernels import reference

    plain, loaded = getattr(reference, op), _loaded[op]
    @functools.wraps(plain)
    def run(*arguments, **options):
        device = "cpu"
        for given in (*arguments, *options.values()):
            if isinstance(given, torch.Tensor):
                device = given.device.type
                break
        if path(op, device)[0] == "reference":
            return plain(*arguments, **options)
        _import(op)
        return loaded[0](*arguments, **options)

    return run


def _import(op):
    if _loaded[op]:
        return
    import torch.compiler.config

    if _digest() not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += _digest()
    _loaded[op].append(getattr(importlib.import_module(f"kernels.{op}"), op))


@functools.cache
def _digest():
    """Of the kernels' sources, for the key of torch.compile's caches, which know an op by its name alone."""
    sources = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


for once in (path, _import):        # when a caller is compiled, the choice is made once, and nothing of it is traced
    once._dynamo_marked_constant = True     # torch.compiler.assume_constant_result, without its import of the compiler
