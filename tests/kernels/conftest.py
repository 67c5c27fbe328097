"""The tests of an op run on the reference, and under TRITON_INTERPRET=1 on its Triton kernels in the interpreter.

Tests marked `triton` are about the kernels alone.
"""

import os

import pytest

import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config, items):
    about_kernels = [item for item in items if item.get_closest_marker("triton")]
    if about_kernels and not INTERPRETED:
        config.hook.pytest_deselected(items=about_kernels)
        items[:] = [item for item in items if item not in about_kernels]


@pytest.fixture(autouse=True)
def on_triton_in_the_interpreter():
    with kernels.use("triton" if INTERPRETED else "auto"):
        yield
