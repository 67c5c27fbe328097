"""The tests of an op run on the reference, and under TRITON_INTERPRET=1 on its Triton kernels in the interpreter.

Tests marked `triton` are about the kernels alone and run in the interpreter only, those marked `compiled` without it.
"""

import os

import pytest

import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config, items):
    elsewhere = [item for item in items if item.get_closest_marker("compiled" if INTERPRETED else "triton")]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


@pytest.fixture(autouse=True)
def on_triton_in_the_interpreter():
    with kernels.use("triton" if INTERPRETED else "auto"):
        yield
