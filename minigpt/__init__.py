"""minigpt: train a small GPT, sample from it, and measure its kernels.

    import minigpt
    run = minigpt.load("runs/quickstart")
    print(run.generate("def main(", minigpt.SamplingParams(max_new_tokens=64, temperature=0.8)))
"""

import importlib

__version__ = "0.1.0"

_HOMES = {"load": "engine", "Engine": "engine", "SamplingParams": "config", "Tokenizer": "tokenizer",
          "GPT": "model", "ModelConfig": "config"}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minigpt.{_HOMES[name]}"), name)
