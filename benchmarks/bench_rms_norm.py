"""Speed of RMSNorm with a residual add, forward and backward:

    python -m benchmarks.bench_rms_norm [--device cuda] [--widths 768] [--paths triton] [--json FILE] [--plot FILE]

The Triton kernels against plain PyTorch, torch.compile of that, and Liger's fused add where it is installed. TB/s are
the bytes that the op must move over the median time. The last line is one JSON object.
"""

from benchmarks import norms


def liger(x, weight, eps, residual):
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)


def main(arguments=None):
    norms.main("rms_norm", 1, liger, __doc__, arguments)


if __name__ == "__main__":
    main()
