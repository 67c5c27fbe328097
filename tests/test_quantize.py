"""`minigpt quantize`: rounded weights, what they cost, and a checkpoint of them that is read as any other."""

import json
import shutil

import pytest
import torch
from compare import assert_close
from tiny import make_text
from twins import random_model

import minigpt
from minigpt import checkpoint, cli
from minigpt.config import SamplingParams
from minigpt.linear import QuantizedEmbedding, QuantizedLinear
from minigpt.quantize import quantized

RUN = ["--model.depth=2", "--model.width=64", "--model.num_heads=2", "--model.context_length=32", "--train.max_steps=4",
       "--tokenizer.vocab_size=300", "--train.batch_size=4", "--train.eval_every=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(make_text(2000), "utf-8")
    cli.train(["configs/quickstart.toml", f"--data.path={folder}/text.txt", f"--train.run_dir={folder}/run", *RUN])
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained / "run", tmp_path / "run")


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(map(str, argv)))
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    return err


@pytest.mark.parametrize("settings", [dict(), dict(tied_embeddings=False, bias=True, mlp="gelu", norm="layer_norm"),
                                      dict(head_transform=True, mlp="gelu_erf", bias=True, width=40)], ids=str)
@pytest.mark.parametrize("bits, most", [(8, 0.03), (4, 0.45)])
def test_logits_are_near_those_of_the_model(settings, bits, most):
    """And are those of a model with the rounded weights, which no layer but the quantized ones differs in."""
    model = random_model(**dict(width=64, depth=1) | settings)
    made = quantized(model, bits)
    whole = random_model(**dict(width=64, depth=1) | settings)
    with torch.no_grad():
        for name, module in made.named_modules():
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                assert module.bits == (8 if name in ("embedding", "head") else bits)
                whole.get_submodule(name).weight.copy_(module.weight)
    tokens = torch.randint(0, 53, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(made(tokens), whole(tokens), 1e-5)
        error = (made(tokens) - model(tokens)).square().mean().sqrt() / model(tokens).square().mean().sqrt()
    assert most / 20 < error < most
    size = {one: sum(t.nbytes for t in checkpoint.model_tensors(one).values()) for one in (model, made)}
    assert size[made] < size[model] / (3 if bits == 8 else 3.5)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_command(run, tmp_path, capsys, bits):
    cli.main(["quantize", str(run), "--bits", str(bits), "--json"])
    found = json.loads(capsys.readouterr().out)
    before, after = found["rows"]
    assert found["path"] == f"{run}-int{bits}" and before["weights"] == "float32"
    assert after["bytes"] < before["bytes"] / 2.5
    assert 0 < abs(after["bits_per_byte"] - before["bits_per_byte"]) < 0.1 * before["bits_per_byte"]
    assert before["tokens_per_second"] > 0 < after["tokens_per_second"]
    made = minigpt.load(found["path"])
    assert made.model.config.weight_bits == bits
    size = (made.path / "model.safetensors").stat().st_size
    assert after["bytes"] < size < after["bytes"] + 20_000
    text = made.generate("the", SamplingParams(temperature=0.0, max_new_tokens=20))
    assert text == made.generate(["the", "a cat"], SamplingParams(temperature=0.0, max_new_tokens=20))[0]
    cli.main(["verify", found["path"]])
    cli.main(["eval", found["path"], "--text", str(run.parent / "run/config.json"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["texts"][-1]["bits_per_byte"] > 0


def test_a_table_and_a_text_of_ones_own(run, tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("A cat sat on the mat.\n" * 20, "utf-8")
    cli.main(["quantize", str(run), "--bits", "8", "--out", str(tmp_path / "made"), "--text", str(text)])
    names, before, after, path = capsys.readouterr().out.splitlines()
    assert names.split("  ")[-1] == "tokens per second" and "float32" in before and "8 bits" in after
    assert path == str(tmp_path / "made") and (tmp_path / "made/manifest.json").is_file()


def test_where_it_is_written(run, monkeypatch, capsys):
    """Beside the run and after its name, whatever names it; not among its checkpoints."""
    step, = run.glob("checkpoints/step-*")
    (run / "text.txt").write_text("A cat sat on the mat.\n", "utf-8")
    monkeypatch.chdir(run)
    for path, bits in ((".", "8"), (str(step), "4")):
        cli.main(["quantize", path, "--bits", bits, "--text", "text.txt"])
        assert capsys.readouterr().out.splitlines()[-1] == f"{run}-int{bits}"


def test_what_is_refused(run, tmp_path, capsys, monkeypatch):
    assert "invalid choice: 5" in refused(capsys, "quantize", run, "--bits", "5")
    assert "no run or checkpoint" in refused(capsys, "quantize", tmp_path / "nowhere", "--bits", "8")
    (tmp_path / "run-int8").mkdir()
    assert "exists already" in refused(capsys, "quantize", run, "--bits", "8")
    assert not list((tmp_path / "run-int8").iterdir())
    out = tmp_path / "made"
    assert "no such file" in refused(capsys, "quantize", run, "--bits", "8", "--out", out, "--text", tmp_path / "none")
    cli.main(["quantize", str(run), "--bits", "4", "--out", str(out)])
    capsys.readouterr()
    assert "has 4 bits already" in refused(capsys, "quantize", out, "--bits", "8")
    assert "has weights of 4 bits; export what" in refused(capsys, "export", out, tmp_path / "exported")
    config = json.loads((run / "config.json").read_text("utf-8"))
    assert "cannot be trained" in refused(capsys, "train", run / "config.json", "--model.weight_bits=8",
                                          f"--train.run_dir={tmp_path}/more")
    state = sorted(run.glob("checkpoints/step-*"))[-1]
    moved = json.loads((state / "config.json").read_text("utf-8"))
    assert moved["data"]["path"] == config["data"]["path"]
    monkeypatch.setattr("minigpt.scores.open_corpus", lambda *_, **__: (_ for _ in ()).throw(
        FileNotFoundError("data.path = 'x': no such file or folder")))
    assert "there is no text to measure it on (data.path = 'x'" in refused(
        capsys, "quantize", run, "--bits", "8", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".other*"))


def test_an_odd_width_takes_8_bits_alone():
    model = random_model(width=25, num_heads=5, head_size=4)
    with pytest.raises(ValueError, match="weights of 4 bits come in pairs, so 25 inputs cannot be"):
        quantized(model, 4)
    quantized(model, 8)
