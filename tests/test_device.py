"""Which device and precision a run gets, and the peak that its MFU is measured against."""

import pytest
import torch

from minigpt import device
from minigpt.device import peak_flops, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_auto_takes_what_is_there(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto").type == pick_device(None).type == kind


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", "vulkan"])
def test_a_device_that_cannot_be_used_is_named(name):
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used: "):
        pick_device(name)


def test_auto_dtype(monkeypatch):
    """On a CPU bfloat16 only where products are clearly faster; on a GPU wherever the hardware has it."""
    for bfloat16_seconds, expected in ((0.5, "bfloat16"), (0.9, "float32"), (30.0, "float32")):
        monkeypatch.setattr(device, "product_seconds",
                            lambda dtype, slow=bfloat16_seconds: slow if dtype is torch.bfloat16 else 1.0)
        assert pick_dtype("auto", CPU) == expected
        assert pick_dtype("bfloat16", CPU) == "bfloat16"
    for has_it, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert pick_dtype("auto", torch.device("cuda")) == expected


def test_the_probe_measures():
    assert 0 < device.product_seconds(torch.float32) < 5


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
                                        ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None),
                                        ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla V100-SXM2-16GB", 125e12)])
def test_peaks_go_by_whole_names(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(CPU) is None
