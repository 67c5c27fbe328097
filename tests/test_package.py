"""The package: every module imports with the core dependencies alone, and importing does nothing else."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CORE = ["torch", "triton", "numpy", "sentencepiece", "safetensors"]
TRITON_MODULES = {("kernels", name) for name in (
    "attention", "common", "decode_attention", "flash_attention", "gelu", "layer_norm", "linear_cross_entropy", "lint",
    "norm", "pointwise", "quantized_linear", "rms_norm", "rotary", "split_heads", "squared_relu", "swiglu")}
"""Those that load Triton; nothing imports them before a Triton kernel is picked."""
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                 for package in ("minigpt", "kernels") for path in (ROOT / package).rglob("*.py")
                 if path.name != "__main__.py" and (path.parent.name, path.stem) not in TRITON_MODULES)

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is no core dependency")

sys.meta_path.insert(0, Blocker())
"""


def run(code, **options):
    """Standard output of a new Python that runs the code in the repository's root."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def core_modules():
    """Top-level modules of the core dependencies and of all that these require."""
    distributions, queue = set(), list(CORE)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in distributions:
            distributions.add(name)
            queue += [requirement.name for requirement in map(Requirement, required)
                      if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]
    return {module for module, owners in metadata.packages_distributions().items()
            if distributions & {owner.lower().replace("_", "-") for owner in owners}}


def test_every_module_imports_with_the_core_dependencies_alone_and_touches_nothing():
    allowed = core_modules() | {"minigpt", "kernels"}
    assert {"torch", "numpy", "sentencepiece", "safetensors"} <= allowed
    assert not allowed & {"transformers", "tokenizers", "pytest", "hypothesis", "scipy"}
    checks = """
import importlib, threading
for name in modules:
    importlib.import_module(name)
import torch
assert "triton" not in sys.modules, "Triton was loaded"
assert not torch.cuda.is_initialized(), "the GPU was touched"
assert threading.active_count() == 1, threading.enumerate()
print("imported", len(modules))
"""
    assert len(MODULES) > 15
    out = run(f"allowed, modules = {allowed}, {MODULES}" + BLOCKER + checks)
    assert out == f"imported {len(MODULES)}\n"


@pytest.mark.parametrize("module", ["transformers", "tokenizers", "pytest", "hypothesis"])
def test_the_blocker_blocks(module):
    """Else the test above could not fail; the module itself is installed."""
    code = f"try:\n    import {module}\nexcept ImportError as error:\n    print(error)\n"
    assert run(f"allowed = {core_modules()}" + BLOCKER + code) == f"{module} is no core dependency\n"
    assert metadata.version(module)


@pytest.mark.parametrize("module", ["minigpt", "minigpt.config", "minigpt.cli", "minigpt.tokenizer", "minigpt.corpus",
                                    "minigpt.data", "kernels"])
def test_light_modules_do_not_load_torch(module):
    """The command's help and its first errors come at once: torch takes seconds to load."""
    assert run(f"import sys, {module}; print('torch' in sys.modules)") == "False\n"


def test_public_names_are_there():
    out = run("import minigpt, kernels\nfor module in (minigpt, kernels):\n"
              "    print([name for name in module.__all__ if not callable(getattr(module, name))])\n"
              "try:\n    minigpt.nothing\nexcept AttributeError as error:\n    print(error)")
    assert out == "[]\n[]\nmodule 'minigpt' has no attribute 'nothing'\n"


def test_the_entry_point_runs():
    assert "usage: minigpt" in run("import runpy, sys; sys.argv = ['minigpt', '--help']; runpy.run_module('minigpt', "
                                   "run_name='__main__')")
