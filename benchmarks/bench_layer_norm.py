"""Speed of LayerNorm with a residual add, forward and backward:

    python -m benchmarks.bench_layer_norm [--device cuda] [--widths 768] [--paths triton] [--json FILE] [--plot FILE]

The Triton kernels against plain PyTorch, torch.compile of that, and Liger where it is installed, which has no fused
add. TB/s are the bytes that the op must move over the median time. The last line is one JSON object.
"""

from benchmarks import norms


def liger(x, weight, bias, eps, residual):
    from liger_kernel.transformers.functional import liger_layer_norm

    total = x + residual
    return liger_layer_norm(total, weight, bias, eps), total


def main(arguments=None):
    norms.main("layer_norm", 2, liger, __doc__, arguments)


if __name__ == "__main__":
    main()
