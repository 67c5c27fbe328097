"""Tasks of lm-evaluation-harness: the same numbers as its own model of transformers gives for what we export.

The harness is large, so these tests are run by `make proofs`, which installs it.
"""

import json
import random

import pytest
from test_cli import fails
from tiny import WORDS, make_text, tiny_config

import minigpt
from minigpt import cli, training
from minigpt.hf import export_model

TASKS = {
    "choose": dict(output_type="multiple_choice", doc_to_text="{{prompt}}", doc_to_target="{{answer}}",
                   doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}]),
    "rolling": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{prompt}}",
                    metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]),
    "continue": dict(output_type="generate_until", doc_to_text="{{prompt}}", doc_to_target="{{choices[answer]}}",
                     generation_kwargs=dict(until=["king", "."], max_gen_toks=12, do_sample=False),
                     metric_list=[{"metric": "bleu"}, {"metric": "exact_match"}]),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(make_text(300), "utf-8")
    training.train(tiny_config(folder, folder / "text.txt", "--train.max_steps=8", "--model.mlp=swiglu"))
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks over a file of questions."""
    folder, chance = tmp_path_factory.mktemp("tasks"), random.Random(0)
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as file:
        for _ in range(30):
            choices = [" " + " ".join(chance.choices(WORDS, k=chance.randrange(1, 4))) for _ in range(4)]
            file.write(json.dumps(dict(prompt=" ".join(chance.choices(WORDS, k=chance.randrange(1, 4))),
                                       choices=choices, answer=chance.randrange(4))) + "\n")
    for name, task in TASKS.items():
        content = dict(task=name, dataset_path="json", test_split="test", metadata={"version": 1.0}, **task,
                       dataset_kwargs={"data_files": {"test": str(folder / "questions.jsonl")}})
        (folder / f"{name}.yaml").write_text(json.dumps(content), "utf-8")
    return folder


def test_the_harness_finds_what_it_finds_of_the_exported_model(run, tasks, tmp_path, capsys):
    """Its own model puts what starts a document before a rolling text, and a tokenizer that does so too, twice."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    export_model(run, tmp_path / "exported")
    theirs, manager = {}, TaskManager(include_path=str(tasks))
    for names, settings in ((["choose", "continue"], {}), (["rolling"], dict(add_bos_token=False))):
        theirs |= lm_eval.simple_evaluate(HFLM(pretrained=str(tmp_path / "exported"), device="cpu", **settings),
                                          tasks=names, log_samples=False, task_manager=manager)["results"]
    capsys.readouterr()
    cli.evaluate([str(run), "--tasks", *TASKS, "--include-path", str(tasks), "--json"])
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert ours.keys() == theirs.keys() == TASKS.keys()
    compared = [(ours[task][name], value) for task in TASKS for name, value in theirs[task].items()
                if isinstance(value, float) and "stderr" not in name]
    assert len(compared) == 6 and any(0 < value < 1 for _, value in compared)
    for value, expected in compared:
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_table_of_tasks(run, tasks, capsys):
    cli.evaluate([str(run), "--tasks", "choose", "--include-path", str(tasks), "--limit=3"])
    assert "choose" in capsys.readouterr().out


def test_tasks_that_there_are_not(run, capsys):
    capsys.readouterr()
    assert "task 'nothing_like_it' is unknown to lm-eval" in fails(capsys, cli.evaluate, str(run), "--tasks",
                                                                    "nothing_like_it")


def test_a_continuation_ends_before_what_stops_it(run):
    from types import SimpleNamespace

    from minigpt.harness import harness_model

    model = harness_model(minigpt.load(run))
    def generate(**settings):
        return model.generate_until([SimpleNamespace(args=("The king", dict(max_gen_toks=30, **settings)))])[0]

    whole = generate()
    stop = whole[9:11]
    assert generate(until=[stop, "zz"]) == generate(until=stop) == whole[:whole.index(stop)] != whole
    begun = model.generate_until([SimpleNamespace(args=("", dict(max_gen_toks=9)))])[0]
    assert begun == minigpt.load(run).generate(None, minigpt.SamplingParams(max_new_tokens=9, temperature=0.0))
    assert generate(do_sample=True) == generate(do_sample=True, temperature=1.0) != whole
    drawn = generate(do_sample=True, temperature=1.5)
    assert drawn != whole and drawn == generate(do_sample=True, temperature=1.5)
