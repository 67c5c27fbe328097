"""`kernels.use` picks the implementation for the process or a block, and an explicit choice that cannot run raises."""

import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels import reference
from kernels.dispatch import OPS


@pytest.fixture(autouse=True)
def auto_after():
    yield
    kernels.use("auto")


def chosen():
    return set(kernels.explain().values())


def test_every_op_is_the_reference_of_its_name():
    assert kernels.__file__ and set(kernels.__all__) == {*OPS, "use", "explain"}
    for op in OPS:
        assert getattr(kernels, op) is getattr(reference, op)


def test_explain_names_every_op_and_why():
    assert kernels.explain().keys() == set(OPS)
    assert chosen() == {("reference", "no Triton kernel exists")}
    with kernels.use("reference"):
        assert chosen() == {("reference", "chosen")}


def test_use_lasts_for_the_process_or_the_block():
    before = chosen()
    kernels.use("reference")
    after = chosen()
    assert after != before
    with kernels.use("auto"):
        assert chosen() == before
        with kernels.use("reference"):
            assert chosen() == after
        assert chosen() == before
    assert chosen() == after


def test_a_block_that_raises_ends_its_choice():
    before = chosen()
    with pytest.raises(KeyError), kernels.use("reference"):
        raise KeyError
    assert chosen() == before


def test_a_choice_that_cannot_run_raises_and_changes_nothing():
    before = chosen()
    for choice, message in (("triton", "no Triton kernel exists for attention"),
                            ("fast", "'fast' is none of: auto, triton, reference")):
        with pytest.raises(ValueError, match=message):
            kernels.use(choice)
        assert chosen() == before


def test_an_unknown_op_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        kernels.atention  # noqa: B018


def test_importing_loads_neither_torch_nor_triton():
    code = "import sys, kernels; kernels.explain(); sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    root = Path(kernels.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
