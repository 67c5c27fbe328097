"""A sweep shows what each setting does: figures by their definitions, and a page that stands alone."""

import dataclasses
import json
import math
import re

import pytest
import torch
from decoding import TOKENIZER, constant_model, model_of, run_of
from tiny import tiny_run

from minigpt.cli import main
from minigpt.config import SamplingParams
from minigpt.engine import Completion
from minigpt.sweep import FIGURES, figures, grid, sweep, sweep_html


def completion(text, value=-1.0):
    tokens = [{"token": chr(id), "id": id, "log_probability": value, "likeliest": []} for id in text.encode()]
    return Completion(text, "length", tokens)


def test_figures_by_hand():
    row = figures([completion("abab"), completion("abcab", -2.0)])
    assert row["distinct_1"] == 3 / 9 and row["distinct_2"] == 4 / 7 and row["distinct_3"] == 1
    assert row["perplexity"] == pytest.approx(math.exp((4 + 10) / 9)) and row["tokens"] == 4.5
    assert figures([completion("abcabcabc")])["repetition"] == 1 - 3 / 6
    assert figures([completion("abcd")])["repetition"] == 0 and figures([completion("abcd")])["self_bleu"] is None
    assert figures([completion("")])["distinct_1"] is None


def test_self_bleu_is_that_of_each_against_the_others():
    from sacrebleu.metrics import BLEU

    texts = ["abcdefgh", "abcdefxy", "mnopqrst"]
    made = figures([completion(text) for text in texts])["self_bleu"]
    words = [" ".join(text) for text in texts]
    bleu = BLEU(tokenize="none", effective_order=True)
    wanted = [bleu.sentence_score(words[0], [words[1], words[2]]), bleu.sentence_score(words[1], [words[0], words[2]]),
              bleu.sentence_score(words[2], [words[0], words[1]])]
    assert made == pytest.approx(sum(score.score for score in wanted) / 3) and 20 < made < 60
    assert figures([completion("abcdef")] * 3)["self_bleu"] == pytest.approx(100)
    assert figures([completion("abcdef"), completion("uvwxyz")])["self_bleu"] < 15


def test_the_perplexity_is_that_of_a_full_forward():
    run = run_of(model_of(context_length=64))
    row, = sweep(run, "To be", grid(SamplingParams(max_new_tokens=20), {"temperature": [0.5]}), 1)
    sample, = run.samples("To be", SamplingParams(max_new_tokens=20, temperature=0.5, log_probabilities=1), 1)
    ids = run.encode_prompt("To be") + [token["id"] for token in sample.tokens]
    with torch.no_grad():
        values = run.engine.possible(run.model(torch.tensor([ids]))[0]).log_softmax(-1)
    start = len(ids) - len(sample.tokens)
    nats = -sum(values[place - 1, ids[place]].item() for place in range(start, len(ids))) / len(sample.tokens)
    assert row["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4) and row["samples"] == [sample.text]


def test_what_a_sweep_shows_is_so():
    """Of letters that are drawn evenly, a low temperature and a ban of repetition do what they are for."""
    run = run_of(constant_model({id: 9.0 + place / 10 for place, id in enumerate(TOKENIZER.encode("abcdefgh"))}))
    params = SamplingParams(max_new_tokens=30, top_p=1.0)
    cold, warm = sweep(run, "x", grid(params, {"temperature": [0.01, 1.0]}), 3)
    assert cold["distinct_1"] < warm["distinct_1"] and cold["self_bleu"] > 99.9 > warm["self_bleu"]
    assert cold["repetition"] > 0.9 > warm["repetition"] and cold["temperature"] == 0.01
    cool = SamplingParams(max_new_tokens=30, temperature=0.05)
    free, held = sweep(run, "x", grid(cool, {"no_repeat_ngram": [0, 4]}), 3)
    assert free["repetition"] > 0 == held["repetition"]
    one, two = sweep(run, "x", grid(params, {"num_beams": [1, 2]}), 3)
    assert (len(one["samples"]), len(two["samples"])) == (3, 2), "a search gives as many as it finds"
    contrastive, = sweep(run, "x", grid(dataclasses.replace(params, top_k=4), {"penalty_alpha": [0.5]}), 3)
    assert len(contrastive["samples"]) == 1 and contrastive["self_bleu"] is None
    beams, = sweep(run, "x", grid(params, {"num_beams": [4]}), 3)
    assert len(set(beams["samples"])) == 3 and beams["perplexity"] < warm["perplexity"]


def test_the_grid_is_every_combination():
    settings = grid(SamplingParams(), {"temperature": [0.5, 1.0], "top_k": [1, 2, 3]})
    assert [(each["temperature"], each["top_k"]) for each, _ in settings] == [
        (0.5, 1), (0.5, 2), (0.5, 3), (1.0, 1), (1.0, 2), (1.0, 3)]
    assert all((params.temperature, params.top_k) == tuple(each.values()) for each, params in settings)
    with pytest.raises(ValueError, match="top_k = 1; give 2 or more"):
        grid(SamplingParams(), {"penalty_alpha": [0.5], "top_k": [4, 1]})


def test_the_page_stands_alone_and_shows_all():
    samples = ["<script>a</script>", "line\none\ttab\x1b[2J"]
    rows = [{"temperature": 0.5, **dict.fromkeys(FIGURES, 0.25), "samples": samples},
            {"temperature": 1.0, **dict.fromkeys(FIGURES), "samples": ["b"]}]
    html = sweep_html(rows, "<b>")
    assert html.startswith("<!DOCTYPE html>") and not re.search(r"<script|https?:|url\(|@import|src=|href=", html, re.I)
    for text in ("&lt;script&gt;a&lt;/script&gt;", "line\none\ttab\\x1b[2J", "&lt;b&gt;", "temperature 0.5",
                 "temperature 1", "self bleu", "sample 2"):
        assert text in html
    assert html.count("<tr>") == html.count("</tr>") == 6 and "\x1b" not in html


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("trained"))


def test_the_verb(tmp_path, capsys, run):
    page = tmp_path / "sweep.html"
    main(["sweep", str(run), "--prompt", "the", "--temperature", "0.5,1", "--top-k", "0,4", "--max-new-tokens", "8",
          "--num-samples", "2", "--html", str(page), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(row["temperature"], row["top_k"]) for row in found["rows"]] == [(0.5, 0), (0.5, 4), (1.0, 0), (1.0, 4)]
    assert all(len(row["samples"]) == 2 and row["perplexity"] > 1 for row in found["rows"])
    assert page.read_text("utf-8").count("<tr>") == 2 + 2 * 4
    main(["sweep", str(run), "--temperature", "0.5,1", "--max-new-tokens", "8", "--num-samples", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert "--- temperature 0.5 ---" in lines and "--- temperature 1 ---" in lines
    head = next(place for place, line in enumerate(lines) if "distinct 1" in line)
    assert len(lines[head + 1].split()) == len(lines[head + 2].split()) == 1 + len(FIGURES)


@pytest.mark.parametrize("flags, message", [
    (["--temperature", "1,hot"], "is not numbers with commas between them"), (["--temperature", "1,-1"], "too small"),
    (["--top-k", ",".join(map(str, range(40))), "--min-p", ",".join(["0.1"] * 40)], "1600 combinations are more than"),
    (["--html", "x.txt"], "must end in .html"), (["--num-samples", "0"], "not between 1"),
    (["--html", ""], "must end in .html"), (["--penalty-alpha", "0,0.5", "--top-k", "1"], "top_k = 1; give 2 or more")])
def test_what_cannot_be_swept(flags, message, capsys, run):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(run), *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
