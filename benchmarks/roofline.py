"""A training step by kernel group: what it must move and compute, the least time for that, and the time it took.

The floor of an op is the longer of its bytes at the speed of a copy and its FLOPs at the speed of a matrix product;
views cost nothing. Counted are the ops that one step of the Triton path runs, on tensors without memory, so that no GPU
is needed for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import kernels
from kernels import dispatch
from minigpt.optim import PRODUCT_DTYPES

UPDATE = "clipping and optimizer"
"""The group of all that runs under torch.profiler.record_function of this name."""
OTHERS = "other"
GROUPS = {
    "minigpt::linear_cross_entropy": "head and loss", "minigpt::scaled": "head and loss",
    "minigpt::attention": "attention", "minigpt::norm": "norms", "minigpt::split_heads": "heads",
    "minigpt::gelu": "activations", "minigpt::swiglu": "activations", "minigpt::squared_relu": "activations",
    "aten::mm": "projections", "aten::addmm": "projections", "aten::bmm": "projections",
    "aten::sum": "sums (bias gradients)", "aten::embedding": "embedding",
    "aten::_to_copy": "casts and copies", "aten::copy_": "casts and copies", "aten::cat": "casts and copies",
    "aten::clone": "casts and copies",
}
"""{how the name of an op begins: its group}."""
H100 = (3.0e12, 798e12)
"""Bytes and FLOPs per second at which one with 80 GB of HBM3 ran torch 2.11's own copy and bfloat16 product of 8192 x
8192 matrices; no kernel of this project was measured there."""


@dataclass
class Group:
    calls: int = 0
    num_bytes: float = 0.0
    flops: float = 0.0
    floor: float = 0.0
    """Seconds."""
    measured: float | None = None
    """Seconds, None where there is no GPU."""


def group_of(names) -> str:
    """Of a kernel that was launched within the named ops and ranges, the innermost first."""
    found = OTHERS
    for name in names:
        if name == UPDATE:
            return UPDATE
        group = next((group for prefix, group in GROUPS.items() if name.startswith(prefix)), None)
        if group and (found == OTHERS or name.startswith("minigpt::")):     # whose own products are part of it
            found = group
    return found


class Counter(TorchDispatchMode):
    """Adds up what the ops that run under it move and compute."""

    def __init__(self, bytes_per_second: float, flops_per_second: float):
        super().__init__()
        self.bytes_per_second, self.flops_per_second = bytes_per_second, flops_per_second
        self.groups: dict[str, Group] = {}
        self.ranges: list[str] = []

    @contextlib.contextmanager
    def within(self, name: str):
        """What torch.profiler.record_function is to the profiler."""
        self.ranges.append(name)
        yield
        self.ranges.pop()

    def __torch_dispatch__(self, op, types, args=(), options=None):
        options = options or {}
        if op is torch.ops.aten._local_scalar_dense.default:                # a number of a tensor without memory
            return 0.0
        out = op(*args, **options)
        if moves_something(op._schema):
            given = {argument.name: value for argument, value in zip(op._schema.arguments, args)} | options
            count = flop_registry.get(op._overloadpacket)
            num_bytes = bytes_of(op._schema, given, out)
            flops = count(*args, **options, out_val=out) if count else flops_of(op._schema.name, given)
            group = self.groups.setdefault(group_of([op._schema.name, *self.ranges]), Group())
            group.calls += 1
            group.num_bytes += num_bytes
            group.flops += flops
            group.floor += max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)
        return out


def moves_something(schema) -> bool:
    """It is neither a view, nor a question about a tensor, nor memory that nothing is written to."""
    space, _, name = schema.name.partition("::")
    return space in ("aten", "minigpt") and not name.startswith(("empty", "new_empty", "_unsafe_view")) and not (
        schema.returns and all(value.alias_info is not None and not value.alias_info.is_write
                               for value in schema.returns))


def bytes_of(schema, given, out) -> int:
    """Each tensor that goes in is read once, each that comes out or is written to is written once."""
    if schema.name == "aten::embedding":
        return 2 * bytes_in(out)
    written = sum(bytes_in(given.get(argument.name)) for argument in schema.arguments
                  if argument.alias_info is not None and argument.alias_info.is_write)
    if schema.name == "aten::_fused_adamw_":
        written -= bytes_in(given["grads"])             # which it may scale, and does not here
    if not any(value.alias_info is not None for value in schema.returns):
        written += bytes_in(out)
    if schema.name in ("aten::zeros_like", "aten::ones_like", "aten::fill_", "aten::zero_"):
        return written
    return bytes_in(list(given.values())) - unread(schema.name, given) + written


def unread(name, given) -> int:
    """Of the projection that split_heads takes values are not read, and backward nothing where there is no norm."""
    if not name.startswith("minigpt::split_heads"):
        return 0
    x = given["x"]
    values = (x.shape[2] - given["H"]) // 2 if "H" in given else given["grad_v"].shape[2]
    without_norm = "grad_v" in given and given["q_weight"] is None
    return bytes_in(x if without_norm else x[:, :, :values])


def bytes_in(value) -> int:
    """Of the tensors in it; an expanded one has those of its memory."""
    if isinstance(value, (list, tuple)):
        return sum(map(bytes_in, value))
    if not isinstance(value, torch.Tensor):
        return 0
    numel = 1
    for size, stride in zip(value.shape, value.stride()):
        numel *= size if stride else min(size, 1)
    return numel * value.itemsize


def flops_of(name, given) -> float:
    """Of the products within one of this project's ops."""
    if name == "minigpt::attention_forward":
        return 4 * attention_size(**given)
    if name == "minigpt::attention_backward":
        return 10 * attention_size(**given)
    if name == "minigpt::linear_cross_entropy_sum":
        products = 1 + given["of_hidden"] + given["of_weight"]
        return 2 * products * given["hidden"].numel() * len(given["weight"])
    return 0


def attention_size(q, k, causal, window, **_) -> float:
    """Head size x pairs of a query and a key that it sees, of all heads; documents hide none of them here."""
    (B, T, H, D), S = q.shape, k.shape[1]
    pairs = T * S
    if causal:
        pairs = sum(min(S if window is None else window, i + S - T + 1) for i in range(max(0, T - S), T))
    return B * H * pairs * D


def count(make: Callable[[], Callable], rates: tuple[float, float]) -> dict[str, Group]:
    """{group: what it moves and computes} of a step on the Triton path of a GPU.

    make() gives a function that takes one, and names its ranges with the function it is given.
    """
    counter = Counter(*rates)
    with mock.patch.object(dispatch, "obstacle", lambda device: None), kernels.use("triton"), \
            mock.patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True), \
            mock.patch.dict(PRODUCT_DTYPES, cpu=PRODUCT_DTYPES["cuda"]), \
            FakeTensorMode(allow_non_fake_inputs=True):
        step = make()
        for _ in range(2):                              # the first also makes the optimizers' state
            counter.groups.clear()
            with counter:
                step(counter.within)
    return counter.groups


def measure(events, groups: dict[str, Group], steps: int, seconds: Callable) -> None:
    """Write the time of each group per step, from the events of a profile of so many steps."""
    for group in groups.values():
        group.measured = 0.0
    for event in events:
        if taken := seconds(event):
            groups.setdefault(group_of(chain(event)), Group(measured=0.0)).measured += taken / steps


def chain(event):
    """Names of an event and of all that it lies in."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def on_gpu(event) -> float:
    """Seconds of the kernels that a profiler's event launched itself."""
    return sum(kernel.duration for kernel in event.kernels) / 1e6


def table(groups: dict[str, Group], step: float | None) -> list[str]:
    """Lines: a row for each group, the costliest first, then their sum, and of a measured step what no kernel took."""
    def line(name, group):
        words = f"{name:<24}{group.calls:>7}{group.num_bytes / 1e9:>10.4g}{group.flops / 1e12:>10.4g}" \
                f"{group.floor * 1e3:>11.4g}"
        if step is not None:
            words += f"{group.measured * 1e3:>13.4g}"
            words += f"{group.floor / group.measured:>10.1%}" if group.measured else ""
        return words

    everything = total(groups)
    lines = [f"{'group':<24}{'calls':>7}{'GB':>10}{'TFLOP':>10}{'floor ms':>11}"
             + f"{'measured ms':>13}{'of floor':>10}" * (step is not None)]
    lines += [line(*item) for item in sorted(groups.items(), key=lambda item: -(item[1].measured or item[1].floor))]
    lines.append(line("all", everything))
    if step is not None:
        lines.append(f"{'no kernel':<62}{(step - everything.measured) * 1e3:>13.4g}")
    return lines


def total(groups: dict[str, Group]) -> Group:
    everything = Group(measured=0.0)
    for group in groups.values():
        everything.calls += group.calls
        everything.num_bytes += group.num_bytes
        everything.flops += group.flops
        everything.floor += group.floor
        everything.measured += group.measured or 0.0
    return everything
