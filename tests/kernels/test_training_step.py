"""A model's training step on the kernels: what is not copied, and that it compiles to one graph."""

import shutil
from collections import Counter

import pytest
import torch
from compare import assert_close
from marks import slow
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from minigpt.config import ModelConfig
from minigpt.model import GPT

GPT2 = dict(norm="layer_norm", mlp="gelu", position="learned", qk_norm=False, bias=True)
VARIANTS = [GPT2, dict(num_kv_heads=1, mlp="swiglu", qk_norm=True, window=5),
            dict(norm_position="post", mlp="squared_relu", position="none")]


def model_of(**settings):
    torch.manual_seed(0)
    return GPT(ModelConfig(**dict(vocab_size=40, context_length=16, depth=2, width=32, num_heads=2) | settings))


def step(model, hidden=None):
    """The loss and all gradients of a mixed-precision step, `hidden` in the place of the model's own."""
    tokens = torch.arange(34).view(2, 17)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy((hidden or model.hidden)(tokens[:, :-1]), model.head.weight, tokens[:, 1:])
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


class Calls(TorchDispatchMode):
    """Counts the ops that run, and keeps the shapes of what is cast."""

    def __init__(self):
        super().__init__()
        self.count, self.cast = Counter(), []

    def __torch_dispatch__(self, op, types, args=(), options=None):
        self.count[op._schema.name] += 1
        if op is torch.ops.aten._to_copy.default:
            self.cast.append(args[0].shape)
        return op(*args, **options or {})


@pytest.mark.triton
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_gradients_of_queries_keys_and_values_are_not_joined(settings):
    """The kernels write them side by side, as the projection's backward reads them."""
    model = model_of(**settings)
    with Calls() as calls:
        step(model)
    assert calls.count["minigpt::attention_backward"] == 2
    assert not calls.count["aten::cat"] + calls.count["aten::split_with_sizes_backward"]


@pytest.mark.triton
def test_no_activation_is_cast_but_the_embedding():
    """Norms read the float32 stream and write bfloat16, and give their gradients in both."""
    with Calls() as calls:
        step(model_of(**GPT2))
    assert [shape for shape in calls.cast if len(shape) > 2] == 2 * [(2, 16, 32)]       # forward and backward


@pytest.mark.parametrize("settings", [VARIANTS[0], *map(slow, VARIANTS[1:])], ids=str)
def test_a_model_compiles_to_one_graph(settings):
    model = model_of(**settings)
    loss, grads = step(model)
    compiled_loss, compiled_grads = step(model, torch.compile(model.hidden, fullgraph=True, backend="aot_eager"))
    assert_close(compiled_loss, loss, 1e-6)
    for pair in zip(compiled_grads, grads, strict=True):
        assert_close(*pair, 1e-2)                       # bfloat16, in which a graph may round less often


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_projection_has_its_gradients_joined_by_nothing():
    from torch._inductor.utils import run_and_get_code

    def heads(x, weight):
        q, k, v = kernels.split_heads((x @ weight).unflatten(-1, (-1, 16)), [2, 1, 1])
        return kernels.attention(q, k, v, causal=True).flatten(-2)

    def run(function):
        given = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
                 for shape in ((1, 20, 8), (8, 64))]
        function(*given).square().sum().backward()
        return [x.grad for x in given]

    grads, codes = run_and_get_code(run, torch.compile(heads, fullgraph=True))
    assert any("attention_backward" in code for code in codes) and not any("cat" in code for code in codes)
    for pair in zip(grads, run(heads), strict=True):
        assert_close(*pair, 1e-5)


@pytest.mark.parametrize("settings", [slow(VARIANTS[0]), *VARIANTS[1:]], ids=str)
def test_a_training_step_equals_that_of_the_reference(settings):
    model = model_of(**settings)
    loss, grads = step(model)
    with kernels.use("reference"):
        expected, expected_grads = step(model)
    assert_close(loss, expected, 1e-3)
    for pair in zip(grads, expected_grads, strict=True):
        assert_close(*pair, 0.3)
