"""The tests of an op run on the reference, and under TRITON_INTERPRET=1 on its Triton kernels in the interpreter.

Tests marked `triton` are about the kernels alone and run in the interpreter only, those marked `compiled` without it.
"""

import os

import pytest
import torch

import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_lang_once(function):
        """As the interpreter's, which patches all of triton.language anew for every function that a kernel calls."""
        used = [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]
        if any(tl.core.is_builtin(lang.load) for lang in used):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang_once


def pytest_collection_modifyitems(config, items):
    elsewhere = [item for item in items if item.get_closest_marker("compiled" if INTERPRETED else "triton")]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


@pytest.fixture(autouse=INTERPRETED)
def memory_holds_nan():
    """Memory that nothing was written to, which torch fills with NaN where algorithms are to be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def on_triton_in_the_interpreter():
    with kernels.use("triton" if INTERPRETED else "auto"):
        yield
