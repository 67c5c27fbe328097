"""`minigpt eval`: every number against its definition, against another library, or against a known value."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from test_cli import fails
from tiny import make_text, tiny_run
from twins import random_model

import minigpt
from minigpt import cli, scores
from minigpt.config import Config, ObjectiveConfig, SamplingParams
from minigpt.engine import Run
from minigpt.evaluate import evaluate
from minigpt.objectives import make_objective
from minigpt.scores import CHOICES, GENERATION
from minigpt.shards import Split
from minigpt.tokenizer import Roles, Tokenizer

BYTES = Tokenizer.train((), kind="bytes")


def opened(seed=0, **settings):
    """A run of a random model over bytes, with a context of 16."""
    model = random_model(seed, vocab_size=BYTES.vocab_size, **settings)
    return Run(model, BYTES, Config(model=model.config), "a model")


def uniform():
    """Every byte has the same probability, a special token none."""
    run = opened(norm="layer_norm", bias=True, mlp="gelu", tied_embeddings=False)
    with torch.no_grad():
        run.model.final_norm.weight.zero_()
        run.model.final_norm.bias.zero_()
        run.model.final_norm.bias[0] = 1.0
        run.model.head.weight.zero_()
        run.model.head.weight[BYTES.is_special, 0] = -1e4
    return run


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 18, 33, 60])
def test_every_token_is_scored_once_with_the_context_of_its_window(stride, length):
    model, T = random_model(), 16
    ids = np.random.default_rng(length).integers(0, 53, length + 1)
    expected = []
    for place in range(length):
        start = max(0, math.ceil((place + 1 - T) / stride)) * stride
        logits = model(torch.tensor(ids[None, start:place + 1]))[0, -1]
        expected.append(-logits.log_softmax(-1)[ids[place + 1]].item())
    assert np.allclose(scores.token_nats(model, ids, stride, batch_size=3), expected, rtol=1e-5)


def test_a_uniform_model_of_bytes_has_8_bits_per_byte(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(20), "utf-8")
    (tmp_path / "b.txt").write_text("天地 naïve", "utf-8")
    rows = scores.score_texts(uniform(), [str(tmp_path)])
    assert [row["file"] for row in rows] == ["a.txt", "b.txt", "all"]
    for row, size in zip(rows, (len(make_text(20).encode()), 13, len(make_text(20).encode()) + 13)):
        assert row["bits_per_byte"] == pytest.approx(8, abs=1e-6) and row["perplexity"] == pytest.approx(256, abs=1e-3)
        assert row["bytes"] == row["tokens"] == size
    assert rows[0]["bits_per_byte_interval"] == pytest.approx([8, 8], abs=1e-6)


def test_bits_per_byte_are_those_of_training(tmp_path):
    """With windows side by side, as the loop takes them."""
    run, text = opened(), make_text(30)
    (tmp_path / "a.txt").write_text(text, "utf-8")
    ids = np.array([BYTES.roles.document_start, *BYTES.encode(text)])
    split = Split([ids], np.array([0]), len(text.encode()))
    found = evaluate(run.model, make_objective(run.config, BYTES).evaluated, split, batch_size=4,
                     autocast=torch.no_grad)
    [row] = scores.score_texts(run, [str(tmp_path / "a.txt")], stride=16)
    assert row["bits_per_byte"] == pytest.approx(found["val_bpb"], rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(found["val_loss"]), rel=1e-6)
    [closer] = scores.score_texts(run, [str(tmp_path / "a.txt")], stride=1)
    assert closer["bits_per_byte"] != row["bits_per_byte"]


def test_all_is_the_sum_of_the_files(tmp_path):
    for name, lines in (("a", 5), ("b", 40)):
        (tmp_path / name).write_text(make_text(lines), "utf-8")
    one, other, both = scores.score_texts(opened(), [str(tmp_path / "b"), str(tmp_path / "a")])
    bits = [row["bits_per_byte"] * row["bytes"] for row in (one, other, both)]
    assert bits[2] == pytest.approx(bits[0] + bits[1])
    assert both["bits_per_byte_interval"][0] < both["bits_per_byte"] < both["bits_per_byte_interval"][1]


def test_a_short_text_has_no_interval(tmp_path):
    (tmp_path / "a.txt").write_text("a", "utf-8")
    [row] = scores.score_texts(opened(), [str(tmp_path / "a.txt")])
    assert row["bits_per_byte_interval"] is None and row["perplexity_interval"] is None


def test_intervals_hold_the_truth_in_95_of_100_cases():
    random = np.random.default_rng(0)
    held = {"ratio": 0, "proportion": 0}
    for _ in range(1000):
        y = random.uniform(10, 30, 80)
        x = y * random.gamma(4.0, 0.5, 80)              # the ratio is 2
        low, high = scores.ratio(x, y)[1]
        held["ratio"] += low < 2 < high
        low, high = scores.proportion(int((random.random(40) < 0.3).sum()), 40)[1]
        held["proportion"] += low < 0.3 < high
    assert 920 <= held["ratio"] <= 975 and 920 <= held["proportion"] <= 975


@pytest.mark.parametrize("hits, n, interval", [(0, 10, (0, 0.2775)), (5, 10, (0.2366, 0.7634)), (20, 20, (0.8389, 1))])
def test_wilson_intervals(hits, n, interval):
    assert scores.proportion(hits, n)[1] == pytest.approx(interval, abs=5e-5)


def test_log_likelihoods_are_those_of_one_text_at_a_time():
    model, random = random_model(), np.random.default_rng(0)
    pairs = [(random.integers(0, 53, a).tolist(), random.integers(0, 53, b).tolist())
             for a, b in ((1, 1), (9, 4), (3, 2), (30, 5), (1, 16), (14, 3))]
    greedy = [int(model(torch.tensor([pairs[1][0]]))[0, -1].argmax())]
    pairs.append((pairs[1][0], greedy))
    found = scores.log_likelihoods(model, pairs, batch_size=3)
    for (before, after), (total, is_greedy) in zip(pairs, found):
        ids = (before + after)[-17:]
        logs = model(torch.tensor([ids[:-1]]))[0, -len(after):].log_softmax(-1)
        expected = logs.gather(1, torch.tensor(after)[:, None]).sum().item()
        assert total == pytest.approx(expected, rel=1e-4)
        assert is_greedy == (logs.argmax(-1).tolist() == after)
    assert found[-1][1] and not all(is_greedy for _, is_greedy in found)
    with pytest.raises(ValueError, match="17 tokens does not fit the context of 16"):
        scores.log_likelihoods(model, [([1], [2] * 17)], 3)


def test_pairs():
    def text(ids):
        return BYTES.decode_bytes(ids).decode()

    before, after = scores.encode_pair(BYTES, "the king ", "shall")
    assert before[0] == BYTES.roles.document_start and text(before) == "the king" and text(after) == " shall"
    before, after = scores.encode_pair(BYTES, "", "shall")
    assert before == [BYTES.roles.document_start] and text(after) == "shall"
    with pytest.raises(ValueError, match="'' is empty"):
        scores.encode_pair(BYTES, "the king", "")


def test_choices():
    run = opened()
    prompts, choices = ["ab", "the king ", "q"], [["a", "bc"], ["shall", "x", "天地"], ["a", "ab", "abc", "abcd"]]
    logs = [[total for total, _ in scores.log_likelihoods(run.model, [
        scores.encode_pair(BYTES, prompt, choice) for choice in given], 1)] for prompt, given in zip(prompts, choices)]
    likeliest = [int(np.argmax(found)) for found in logs]
    per_byte = [int(np.argmax([total / len(choice.encode()) for total, choice in zip(found, given)]))
                for found, given in zip(logs, choices)]
    assert likeliest != per_byte
    items = [dict(prompt=prompt, choices=given, answer=answer)
             for prompt, given, answer in zip(prompts, choices, likeliest)]
    row = scores.score_choices(run, items)
    assert row["accuracy"] == 1 and row["questions"] == 3
    assert row["accuracy_per_byte"] == sum(map(int.__eq__, likeliest, per_byte)) / 3
    wrong = [item | {"answer": (item["answer"] + 1) % len(item["choices"])} for item in items]
    assert scores.score_choices(run, wrong)["accuracy"] == 0


def test_the_examples_of_sacrebleu():
    """From its README: three sentences, two references, of which the second lacks one."""
    outputs = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [["The dog bit the man.", "The dog had bit the man."],
                  ["It was not unexpected.", "No one was surprised."],
                  ["The man bit him first.", "The man had bitten the dog."]]
    row = scores.compare(outputs, references)
    assert row["bleu"] == pytest.approx(48.530827009929865)
    assert row["bleu_signature"].startswith("nrefs:2|") and row["bleu_interval"][0] < 48.53 < row["bleu_interval"][1]
    from sacrebleu import sentence_chrf

    assert scores.compare(outputs[:1], references[:1])["chrf"] == sentence_chrf(outputs[0], references[0]).score == 100
    uneven = scores.compare(outputs, [references[0], references[1][:1], references[2]])
    assert uneven["bleu"] == pytest.approx(48.530827009929865, abs=15) and uneven["outputs"] == 3


def test_the_example_of_rouge_score():
    """From its README: of 9 and 8 words 6 are shared, 2 pairs of 8 and 7, and 5 words in the same order."""
    row = scores.compare(["The quick brown dog jumps on the log."], [["The quick brown fox jumps over the lazy dog"]])
    assert row["rouge1"] == pytest.approx(100 * 12 / 17) and row["rougeL"] == pytest.approx(100 * 10 / 17)
    assert row["rouge2"] == pytest.approx(100 * 2 * (2 / 7) * (2 / 8) / (2 / 7 + 2 / 8)) and row["outputs"] == 1
    best = scores.compare(["a b"], [["c d", "a b", "e"]])
    assert best["rouge1"] == best["rougeL"] == 100


def test_generation_is_greedy():
    run = opened()
    texts = [run.generate(prompt, SamplingParams(temperature=0.0, max_new_tokens=9)) for prompt in ("ab", "the")]
    items = [dict(prompt=prompt, references=[text, "else"]) for prompt, text in zip(("ab", "the"), texts)]
    assert scores.score_generation(run, items, max_new_tokens=9)["chrf"] == pytest.approx(100)


@pytest.mark.parametrize("keys, line", [
    (CHOICES, "{"), (CHOICES, "[]"), (CHOICES, '{"prompt": "a", "choices": ["b"]}'),
    (CHOICES, '{"prompt": "a", "choices": ["b"], "answer": 1}'),
    (CHOICES, '{"prompt": "a", "choices": ["b"], "answer": true}'),
    (CHOICES, '{"prompt": "a", "choices": [], "answer": 0}'), (CHOICES, '{"prompt": "a", "choices": [1], "answer": 0}'),
    (GENERATION, '{"prompt": "a", "references": "b"}'), (GENERATION, '{"prompt": "a", "references": []}'),
    (GENERATION, '{"prompt": 1, "references": ["b"]}'), (GENERATION, '{"prompt": "a", "references": [null]}'),
])
def test_items_that_cannot_be_read(keys, line, tmp_path):
    good = {CHOICES["answer"]: dict(prompt="a", choices=["b"], answer=0)}.get(
        keys.get("answer"), dict(prompt="a", references=["b"]))
    path = tmp_path / "items.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=r"items\.jsonl:3: must be a JSON object with prompt \(str\)"):
        scores.read_items(path, keys)
    path.write_text(f"{json.dumps(good)}\n\n", "utf-8")
    assert scores.read_items(path, keys) == [good | {"place": f"{path}:1"}]
    path.write_text("\n", "utf-8")
    with pytest.raises(ValueError, match="holds no item"):
        scores.read_items(path, keys)


def test_a_text_that_the_tokenizer_has_no_tokens_for(tmp_path):
    """Regression: bits per byte left out what was unknown, and looked excellent."""
    (tmp_path / "a.txt").write_text("天地 a", "utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_text(50).splitlines()), model_writer=model, model_type="bpe", vocab_size=100,
        minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False)
    tokenizer = Tokenizer("sentencepiece", model.getvalue(), Roles(1, (2,), 2, None, (1,)))
    run = opened()
    run = Run(run.model, tokenizer, run.config, "m")
    with pytest.raises(ValueError, match=r"a\.txt: the tokenizer has no token for some of it"):
        scores.score_texts(run, [str(tmp_path / "a.txt")])


def test_a_loss_beyond_all_bounds(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text", "utf-8")
    run = opened(tied_embeddings=False)
    with torch.no_grad():
        run.model.head.weight.mul_(1e5)
    [row] = scores.score_texts(run, [str(tmp_path / "a.txt")], stride=1)
    assert row["perplexity"] is None and row["bits_per_byte"] > 1000
    cli._table([row])
    assert capsys.readouterr().out.split()[-1] == "-"


def test_items_that_cannot_be_scored(tmp_path):
    run = opened()
    for item, message in ((dict(prompt="a", choices=["b" * 17], answer=0), "x.jsonl:3: a text of 17 tokens does not"),
                          (dict(prompt="a", choices=["b", ""], answer=0), "x.jsonl:3: '' is empty")):
        with pytest.raises(ValueError, match=message):
            scores.score_choices(run, [item | {"place": "x.jsonl:3"}])
    with pytest.raises(ValueError, match="x.jsonl:3: the prompt is empty"):
        scores.score_generation(run, [dict(prompt="", references=["a"], place="x.jsonl:3")])


def test_models_that_cannot_be_measured(tmp_path):
    (tmp_path / "a.txt").write_text("text", "utf-8")
    causal = opened()
    masked = Run(causal.model, BYTES, dataclasses.replace(causal.config, objective=ObjectiveConfig(name="masked")), "m")
    bare = Run(causal.model, None, causal.config, "m")
    for run, message in ((masked, "only a causal model"), (bare, "no tokenizer")):
        with pytest.raises(ValueError, match=message):
            scores.score_texts(run, [str(tmp_path / "a.txt")])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("trained"))


def test_the_command(trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(make_text(30), "utf-8")
    (tmp_path / "c.jsonl").write_text('{"prompt": "the", "choices": [" king", " sword"], "answer": 1}\n', "utf-8")
    (tmp_path / "g.jsonl").write_text('{"prompt": "the king", "references": [" shall"]}\n', "utf-8")
    arguments = [str(trained), "--text", str(tmp_path / "text.txt"), "--choices", str(tmp_path / "c.jsonl"),
                 "--generation", str(tmp_path / "g.jsonl"), "--max-new-tokens=5"]
    capsys.readouterr()
    cli.evaluate([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"run", "texts", "choices", "generation"}
    run = minigpt.load(trained)
    assert found["texts"] == scores.score_texts(run, [str(tmp_path / "text.txt")])
    cli.evaluate(arguments)
    table = capsys.readouterr().out.splitlines()
    [row] = found["texts"]
    low, high = row["bits_per_byte_interval"]
    assert f"{row['bits_per_byte']:.4f} ({low:.4f} to {high:.4f})" in table[1] and "bits per byte" in table[0]
    assert len({len(line) for line in table[:2]}) == 1
    assert any("accuracy per byte" in line for line in table) and any("rougeL" in line for line in table)


@pytest.mark.parametrize("arguments, message", [
    ([], "nothing to measure; give --text, --choices, --generation, --labelled or --tasks"),
    (["--text", "nowhere"], "--text = 'nowhere': no such file or folder"),
    (["--text", "text.txt", "--stride", "33"], "a stride of 33 is not between 1 and the context of 32"),
    (["--text", "text.txt", "--stride", "-1"], "--stride -1 is too small; the least is 0"),
    (["--text", "text.txt", "--batch-size", "0"], "--batch-size 0 is too small; the least is 1"),
    (["--text", "binary"], "byte 1 is not UTF-8"),
    (["--text", "empty"], "the file is empty"),
    (["--choices", "nowhere"], "nowhere: No such file or directory"),
    (["--choices", "text.txt"], "text.txt:1: must be a JSON object"),
    (["--generation", "text.txt"], "text.txt:1: must be a JSON object"),
    (["--tasks", "x", "--limit", "0"], "--limit 0 is too small; the least is 1"),
])
def test_what_cannot_be_measured(arguments, message, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text", "utf-8")
    (tmp_path / "binary").write_bytes(b"a\xff")
    (tmp_path / "empty").touch()
    capsys.readouterr()
    assert message in fails(capsys, cli.evaluate, str(trained), *arguments)


def test_a_text_that_gives_no_token(tmp_path):
    """Spaces, of a tokenizer that splits at them; nothing is scored, and nothing of it is nan."""
    assert len(scores.token_nats(random_model(), np.array([1]), 8, 2)) == 0
    (tmp_path / "a.txt").write_text("\n\n", "utf-8")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    words.add_special_tokens(["<s>"])
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    run = opened()
    run = Run(run.model, Tokenizer("tokenizers", words.to_str().encode(), Roles(0, (0,), 0, None, ())), run.config, "m")
    with pytest.raises(ValueError, match=r"a\.txt: the tokenizer has no token for some of it"):
        scores.score_texts(run, [str(tmp_path / "a.txt")])
