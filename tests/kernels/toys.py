"""Kernels that `kernels.lint` must pass or reject, an op for each reason; `python toys.py ARGUMENTS` lints them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from kernels import dispatch, lint
from kernels.common import LintCase


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


@triton.jit
def subtract_sum(x, y, BLOCK: tl.constexpr):
    """Each thread holds BLOCK / threads numbers until their sum is known."""
    row = tl.load(x + tl.arange(0, BLOCK))
    tl.store(y + tl.arange(0, BLOCK), row - tl.sum(row))


@triton.jit
def product(a, b, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for step in range(steps):
        acc = tl.dot(tl.load(a + (step * M + m) * K + k), tl.load(b + (step * K + k[:, None]) * N + n), acc,
                     input_precision="ieee")
    tl.store(out + m * N + n, acc)


@triton.jit
def attend(q, k, v, out, S, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Online softmax; one warp group of 128 x 128 scores leaves no registers to keep WGMMAs in flight."""
    m, n, d = tl.arange(0, M)[:, None], tl.arange(0, N)[:, None], tl.arange(0, D)
    queries = tl.load(q + m * D + d)
    acc = tl.zeros((M, D), tl.float32)
    top = tl.full((M,), -1e30, tl.float32)
    for start in range(0, S, N):
        scores = tl.dot(queries, tl.trans(tl.load(k + (start + n) * D + d)))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None]).to(tl.bfloat16)
        acc = tl.dot(weights, tl.load(v + (start + n) * D + d), acc * tl.exp2(top - new_top)[:, None])
        top = new_top
    tl.store(out + m * D + d, acc)


@triton.jit
def broken(x):
    tl.static_assert(False, "the toy that does not compile")


def case(kernel, signature, constexprs, kind, name=None, aligned=None, **options):
    return LintCase(name or kernel.__name__, kernel, signature, constexprs, kind,
                    tuple(signature) if aligned is None else aligned, {"enable_fp_fusion": True} | options)


COPY = {"x": "*bf16", "y": "*bf16", "n": "i32"}
PRODUCT = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "steps": "i32"}
ATTEND = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*fp32", "S": "i32"}
FLOAT32 = PRODUCT | {"a": "*fp32", "b": "*fp32"}
SQUARE = {"M": 64, "N": 64, "K": 64}
SMALL = {"M": 32, "N": 32, "K": 32}
TOYS = {
    "good": [
        case(copy, COPY, {"BLOCK": 2048}, "memory"),
        case(product, PRODUCT, SQUARE, "dot", num_stages=3),
        case(product, FLOAT32, SMALL, "plain", name="float32_product"),
    ],
    "spills": [case(subtract_sum, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 8192}, "memory", maxnreg=32)],
    "registers": [case(subtract_sum, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 65536}, "memory", num_warps=32,
                       maxnreg=128)],
    "serialized": [case(attend, ATTEND, {"D": 64, "M": 128, "N": 128}, "dot", num_stages=2)],
    "shared": [case(product, PRODUCT, SQUARE, "dot", num_stages=20)],
    "float32": [case(product, FLOAT32, SMALL, "dot")],
    "warp_level": [case(product, PRODUCT, SQUARE | {"M": 16}, "dot")],
    "narrow": [case(copy, COPY, {"BLOCK": 512}, "memory", aligned=("x", "y"))],
    "broken": [case(broken, {"x": "*bf16"}, {}, "plain")],
    "empty": [],
}

if __name__ == "__main__":
    dispatch.OPS = tuple(TOYS)
    sys.modules |= {f"kernels.{op}": SimpleNamespace(lint_cases=lambda cases=cases: cases)
                    for op, cases in TOYS.items()}
    sys.exit(lint.main())
