"""A decoding step as a flat list of torch's ops: what Python does in each layer is done once, as a step is recorded.

In a model of a few layers that is much of a step's time on a CPU. The ops, and so the bits, are the model's own.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from minigpt.cache import Decode, KVCache, Prefill
from minigpt.model import GPT


class FlatStep:
    """step(tokens (1, T), view) gives the logits (T, V) in float32, as `model.hidden` and `model.head` do.

    The first call with so many tokens is recorded. The model's weights must stay where they are.
    """

    def __init__(self, model: GPT):
        self.model, self.runs = model, {}
        """runs: {T: what replays the step, None where it is run anew}"""

    def __call__(self, tokens: torch.Tensor, view: Decode | Prefill) -> torch.Tensor:
        T = tokens.shape[1]
        if self.runs.get(T):
            return self.runs[T](tokens, view.positions(tokens), view.attend)
        if T in self.runs:                              # it writes to what it is given, and is not recorded
            return self.model.head(self.model.hidden(tokens, cache=view)[0]).float()
        recorder = _Recorder(tokens, view)
        with recorder:
            logits = self.model.head(self.model.hidden(tokens, cache=recorder)[0]).float()
        self.runs[T] = None if recorder.writes else recorder.function(logits)
        return logits


class GraphStep:
    """The same on a GPU, as a CUDA graph: one launch for a step of slots 0 to `rows` - 1."""

    def __init__(self, model: GPT, cache: KVCache, rows: int):
        self.model, self.view, self._replay = model, Decode(cache, dict.fromkeys(range(rows), -1)), None
        self.tokens = torch.zeros(1, rows, dtype=torch.int64, device=cache.keys.device)

    def __call__(self, tokens: torch.Tensor, view: Decode) -> torch.Tensor:
        self.tokens.copy_(tokens)
        self.view.take(view)
        if self._replay is None:
            self._replay = captured(
                lambda: self.model.head(self.model.hidden(self.tokens, cache=self.view)[0]).float())
        return self._replay()


def captured(function):
    """A function that replays, as a CUDA graph, what `function` does, and gives the tensor that it gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                     # kernels are compiled and libraries begun outside the graph
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay():
        graph.replay()
        return result
    return replay


class _Recorder(TorchDispatchMode):
    """Runs ops and notes them as lines of Python; what depends on constants alone becomes a constant itself."""

    def __init__(self, tokens, view):
        super().__init__()
        self.view, self.writes, self.lines = view, False, []            # (name, what it needs, its line)
        self.given = view.positions(tokens)
        self.names = {id(tokens): "tokens", id(self.given): "positions"}
        self.globals, self.alive = {}, [tokens]                                 # no id may be given twice

    @classmethod
    def _should_skip_dynamo(cls):
        return False                                    # or torch imports its compiler, which takes a second

    def positions(self, tokens):
        return self.given

    def attend(self, layer, q, k, v, window):
        """Not looked into, as what it reads grows with the text."""
        with torch.utils._python_dispatch._disable_current_modes():
            y = self.view.attend(layer, q, k, v, window)
        self._note("attend", (layer, q, k, v, window), {}, y)
        return y

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        options = options or {}
        result = op(*arguments, **options)
        self.writes |= op._schema.is_mutable
        if any(id(leaf) in self.names for leaf in tree_flatten((arguments, options))[0]):
            name = f"op_{op.name().replace('::', '_').replace('.', '_')}"
            self.globals[name] = op._op
            self._note(name, arguments, options, result)
        return result

    def _note(self, function, arguments, options, result):
        needs = []

        def spelled(value):
            if id(value) in self.names:
                needs.append(self.names[id(value)])
                return _Name(needs[-1])
            if value is None or isinstance(value, (bool, int, str)):
                return value
            name = f"constant_{id(value)}"
            self.globals[name] = value
            return _Name(name)

        words = [repr(tree_map(spelled, argument)) for argument in arguments]
        words += [f"{key}={tree_map(spelled, value)!r}" for key, value in options.items()]
        name = f"v{len(self.lines)}"
        self.lines.append((name, needs, f"{name} = {function}({', '.join(words)})"))
        self._name(result, name)

    def _name(self, result, name):
        self.alive.append(result)
        if isinstance(result, torch.Tensor):
            self.names[id(result)] = name
        else:                                           # a tuple or list of them
            for index, part in enumerate(result):
                self.lines.append((f"{name}_{index}", [name], f"{name}_{index} = {name}[{index}]"))
                self._name(part, f"{name}_{index}")

    def function(self, result):
        """step(tokens, positions, attend) of the lines that `result` needs."""
        needed, lines = {self.names[id(result)]}, []
        for name, needs, line in reversed(self.lines):
            if name in needed:
                needed.update(needs)
                lines.append(line)
        body = "\n ".join([*reversed(lines), f"return {self.names[id(result)]}"])
        exec(compile(f"def step(tokens, positions, attend):\n {body}", "<a recorded step>", "exec"), self.globals)
        return self.globals["step"]


class _Name(str):
    """Stands in a line as it is."""

    __repr__ = str.__str__
