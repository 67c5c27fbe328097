"""A model of ours for lm-evaluation-harness: its `LM`, which scores and continues texts for the harness's tasks."""

from __future__ import annotations

import numpy as np

from minigpt.config import SamplingParams
from minigpt.scores import encode_pair, log_likelihoods, token_nats


def harness_model(run, batch_size: int = 8):
    """An `lm_eval.api.model.LM` of an opened run, for `lm_eval.simple_evaluate(model=...)`.

    `loglikelihood_rolling` scores windows that overlap by half (see `scores.token_nats`), where the harness's own
    models take windows side by side. Raises ValueError where lm-eval is missing.
    """
    LM = _harness().api.model.LM

    class MiniGPT(LM):
        def loglikelihood(self, requests, disable_tqdm=False):
            pairs = [encode_pair(run.tokenizer, *request.args) for request in requests]
            return log_likelihoods(run.model, pairs, batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            start, half = run.tokenizer.roles.document_start, max(1, run.model.config.context_length // 2)
            texts = [np.array([start, *run.tokenizer.encode(request.args[0])]) for request in requests]
            return [-float(token_nats(run.model, ids, half, batch_size).sum()) for ids in texts]

        def generate_until(self, requests, disable_tqdm=False):
            return [self._generate(*request.args) for request in requests]

        def _generate(self, context, settings):
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            text = ""
            temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
            for piece in run.stream(context or None, SamplingParams(
                    max_new_tokens=settings.get("max_gen_toks", 256), temperature=temperature)):
                text += piece
                if any(stop in text for stop in stops):
                    break
            return text[:min([len(text), *(text.find(stop) for stop in stops if stop in text)])]

    return MiniGPT()


def run_tasks(run, tasks: list[str], *, include_path: str | None = None, num_fewshot: int | None = None,
              limit: int | None = None, batch_size: int = 8) -> dict[str, dict]:
    """{task: {metric: value}} as lm-evaluation-harness finds them; `include_path` is a folder with tasks of one's own.

    Raises ValueError for a task that it does not know.
    """
    harness = _harness()
    manager = harness.tasks.TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"task {unknown[0]!r} is unknown to lm-eval; name one of its own, or give the folder of its "
                         "YAML file as --include-path")
    found = harness.simple_evaluate(harness_model(run, batch_size), tasks=tasks, task_manager=manager,
                                    num_fewshot=num_fewshot, limit=limit, log_samples=False)
    return found["results"]


def _harness():
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError(f"tasks need the package {error.name}; install it with pip install 'minigpt[eval]'") from None
    return lm_eval
