"""`kernels.use` picks the implementation for the process or a block, and an explicit choice that cannot run raises."""

import hashlib
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import kernels
from kernels import dispatch, reference
from kernels.dispatch import OPS

ROOT = Path(kernels.__file__).parent.parent


def chosen():
    return set(kernels.explain().values())


def test_every_op_has_the_signature_of_its_reference():
    assert kernels.__file__ and set(kernels.__all__) == {*OPS, "use", "explain"}
    for op in OPS:
        assert inspect.signature(getattr(kernels, op)) == inspect.signature(getattr(reference, op))


def test_explain_names_every_op_and_why():
    assert kernels.explain().keys() == set(OPS)
    with kernels.use("reference"):
        assert chosen() == {("reference", "chosen")}


def test_auto_takes_the_reference_on_a_cpu():
    with kernels.use("auto"):
        assert {path for path, _ in kernels.explain().values()} == {"reference"}
        assert all(reason for _, reason in kernels.explain().values())


def test_the_module_of_an_ops_kernels_does_not_take_its_name():
    class Module(types.ModuleType):
        """As the import system sets it on the package."""

    op = kernels.attention
    kernels.attention = Module("kernels.attention")
    assert kernels.attention is op


def test_use_lasts_for_the_process_or_the_block():
    kernels.use("auto")
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
    with pytest.raises(ValueError, match="'fast' is none of: auto, triton, reference"):
        kernels.use("fast")
    assert chosen() == before
    code = "import kernels; kernels.use('triton')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    hidden = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""},
                            capture_output=True, text=True)
    assert "ValueError: kernels = triton: " in hidden.stderr and "take auto or reference" in hidden.stderr


def test_the_device_is_that_of_the_first_tensor(monkeypatch):
    """Regression: it was that of the first argument, so kernels.attention(causal=True, q=q, ...) took the reference."""
    asked = []
    monkeypatch.setattr(dispatch, "path", lambda op, device: asked.append(device) or ("reference", ""))
    x = torch.ones(2, 4, device="meta")
    kernels.rms_norm(eps=1e-5, weight=None, x=x)
    kernels.rms_norm(x, None, 1e-5)
    assert asked == ["meta", "meta"]


@pytest.mark.triton
def test_the_kernels_sources_are_in_the_key_of_compiled_code():
    """Regression: after an update of an op, torch.compile's cache gave back code that called it as it was before."""
    import torch.compiler.config

    with kernels.use("triton"):
        kernels.squared_relu(torch.ones(2))
        kernels.squared_relu(torch.ones(2))
    assert torch.compiler.config.cache_key_tag.count(dispatch._digest()) == 1
    sources = [file.read_bytes() for file in sorted((ROOT / "kernels").glob("*.py"))]
    assert dispatch._digest() == hashlib.sha256(b"\0".join(sources)).hexdigest()


def test_the_mark_of_what_is_traced_once_is_that_of_torch():
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked) and vars(marked).items() <= vars(dispatch.path).items()
    assert vars(marked).items() <= vars(dispatch._import).items()


def test_an_unknown_op_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        kernels.atention  # noqa: B018


def test_importing_loads_neither_torch_nor_triton():
    code = "import sys, kernels; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
