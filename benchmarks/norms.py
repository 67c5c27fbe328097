"""What the benchmarks of layer_norm and rms_norm share: the grid, the paths, and how a path is measured."""

from __future__ import annotations

import functools
import importlib.util

import torch

import kernels
from benchmarks import harness
from kernels import dispatch, reference

WIDTHS = (256, 512, 768, 1024, 2048, 4096, 8192, 16384)
ROWS = 32768
CPU_WIDTHS, CPU_ROWS = (256, 1024), 1024
EPS = 1e-5


def main(op: str, num_parameters: int, liger, doc: str, arguments: list[str] | None = None) -> None:
    """Measure op(x, *parameters, eps, residual), and `liger` of the same arguments where Liger is installed."""
    parser = harness.parser(doc)
    parser.add_argument("--rows", type=int, help=f"{ROWS} on a GPU, {CPU_ROWS} on a CPU")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--paths", nargs="+", help="of triton, reference, compiled, liger: those that exist here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    rows = options.rows or (ROWS if on_gpu else CPU_ROWS)
    paths = available(op, liger, device)
    if unknown := set(options.paths or ()) - paths.keys():
        parser.error(f"no path {', '.join(sorted(unknown))} here; there is: {', '.join(paths)}")
    copy = harness.copy_bytes_per_second(device)
    print(f"{op}, {rows} rows of {dtype} with residual; a copy runs at {copy / 1e12:.3f} TB/s")
    print(f"{'direction':>9} {'width':>6} {'path':>10} {'median ms':>10} {'TB/s':>7} {'of copy':>8}")
    results = []
    for width in options.widths or (WIDTHS if on_gpu else CPU_WIDTHS):
        inputs = Inputs(rows, width, num_parameters, dtype, device)
        for path in options.paths or paths:
            for direction, calls in (("forward", inputs.forward), ("backward", inputs.backward)):
                try:
                    figures = harness.measure(calls(paths[path]), device, options.repeats or (100 if on_gpu else 20),
                                              inputs.num_bytes, copy)
                    shown = "{median_ms:10.4f} {tb_per_s:7.3f} {share_of_copy:8.0%}".format(**figures)
                except Exception as error:              # what one path raises must not cost the others' figures
                    figures = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
                    shown = figures["error"]
                results.append({"direction": direction, "width": width, "path": path} | figures)
                print(f"{direction:>9} {width:>6} {path:>10} {shown}", flush=True)
    harness.finish({"benchmark": op, **harness.machine(device), "dtype": str(dtype).removeprefix("torch."),
                    "rows": rows, "copy_tb_per_s": round(copy / 1e12, 4), "results": results}, options.json)


def available(op, liger, device) -> dict:
    """{path: op(x, *parameters, eps, residual)} of what is there for the device."""
    plain = getattr(reference, op)
    paths = {"reference": plain, "compiled": harness.compiled(plain)}
    if dispatch.obstacle(device.type) is None:
        paths = {"triton": functools.partial(on_triton, getattr(kernels, op))} | paths
        if importlib.util.find_spec("liger_kernel"):
            paths["liger"] = liger
    return paths


def on_triton(function, *arguments):
    with kernels.use("triton"):
        return function(*arguments)


class Inputs:
    """Sets of random inputs and incoming gradients, one for each call in turn."""

    def __init__(self, rows, width, num_parameters, dtype, device):
        def random(*shape):
            return torch.randn(shape, dtype=dtype, device=device)

        torch.manual_seed(0)
        self.num_bytes = 4 * rows * width * dtype.itemsize
        """Of a pass: forward reads x and residual and writes y and the sum; backward reads the gradients of both and
        the sum and writes one gradient, which is that of x and of residual."""
        self.sets = [[random(rows, width).requires_grad_() for _ in range(2)]
                     for _ in range(harness.rotations(self.num_bytes // 2, device))]
        self.grads = [random(rows, width) for _ in range(2)]
        self.parameters = [torch.rand(width, device=device).requires_grad_() for _ in range(num_parameters)]

    def run(self, op, x, residual):
        return op(x, *self.parameters, EPS, residual)

    def forward(self, op):
        return [functools.partial(self.run, op, *rows) for rows in self.sets]

    def backward(self, op):
        return [functools.partial(torch.autograd.grad, self.run(op, *rows), [*rows, *self.parameters], self.grads,
                                  retain_graph=True) for rows in self.sets]
