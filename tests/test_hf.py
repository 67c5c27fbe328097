"""`minigpt import` and `minigpt export`: whole or not at all, and what cannot be read is named."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from compare import assert_close
from safetensors.torch import load_file, save_file
from test_cli import ROOT, fails
from tiny import make_text, tiny_config
from twins import LINEAR, LLAMA3, bert_twins, gpt2_twins, llama_twins

import minigpt
from minigpt import cli, hf, training
from minigpt.families import Unsupported
from minigpt.model import RotaryPositions
from minigpt.objectives import text_rows
from minigpt.tokenizer import Tokenizer
from minigpt.verify import verify

DEFAULT_ROPE = ({"rope_type": "default", "rope_theta": 500.0}, dict(rope_base=500.0))
TWINS = {"gpt2": gpt2_twins, "bert": bert_twins, "llama": lambda: llama_twins("Llama"),
         "bert, next sentence": lambda: bert_twins("BertForPreTraining")}


@pytest.fixture
def saved(tmp_path):
    """save(name, **options): the folder of a model of TWINS, as transformers saves it."""
    def save(name="llama", **options):
        TWINS[name]()[0].save_pretrained(tmp_path / "theirs", **options)
        return tmp_path / "theirs"
    return save


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(source, *arguments): the one line of an import that must fail, and leave nothing behind."""
    def refused(source, *arguments):
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        line = fails(capsys, cli.import_, str(source), str(tmp_path / "out"), *arguments)
        assert sorted(tmp_path.iterdir()) == before
        return line
    return refused


def weights_of(path):
    return minigpt.load(path, "cpu").model.state_dict().values()


def changed(folder, **keys):
    """config.json with keys changed, or without those that are `...`."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), "utf-8")


def change_tensors(folder, change):
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf.WEIGHTS)


def test_what_import_writes_is_a_checkpoint(saved, tmp_path, capsys):
    folder, out = saved("gpt2"), tmp_path / "new" / "out"
    cli.import_([str(folder), str(out)])
    printed = capsys.readouterr()
    warning = printed.err.splitlines()[-1]
    assert printed.out == f"{out}: GPT2LMHeadModel, 16,152 parameters\n"
    assert warning.startswith(f"warning: {folder} has no tokenizer.json or vocab.json and merges.txt or")
    assert [finding.status for finding in verify(out)] == ["ok"]
    run = minigpt.load(out)
    assert run.tokenizer is None and run.config.objective.name == "causal"
    assert "has no tokenizer; import it again with --tokenizer DIR" in fails(capsys, cli.sample, str(out), "--prompt=a")
    assert "exists already; name another" in fails(capsys, cli.import_, str(folder), str(out))


def test_nothing_but_the_output_is_touched(saved, tmp_path, capsys):
    """Regression: the directory .out beside out was removed, whosever it was."""
    folder = saved()
    (tmp_path / ".out").mkdir()
    (tmp_path / ".out" / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    capsys.readouterr()
    for out in (".out", "link", "theirs", "theirs/config.json"):
        assert f"{out} exists already; name another" in fails(capsys, cli.import_, str(folder), str(tmp_path / out))
    cli.import_([str(folder), str(tmp_path / "out")])
    cli.export([str(tmp_path / "out"), str(tmp_path / "back")])
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    capsys.readouterr()
    fails(capsys, cli.import_, str(folder), str(tmp_path / "a" / "b" / "c"))
    assert {path.name for path in tmp_path.iterdir()} == {".out", "link", "theirs", "out", "back"}
    assert (tmp_path / ".out" / "mine").exists() and os.path.lexists(tmp_path / "link")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(number, saved, tmp_path):
    folder = saved()
    before = sorted(tmp_path.iterdir())
    usual = "default_int_handler" if number == signal.SIGINT else "SIG_DFL"     # also where it was ignored, as by nohup
    code = ("import os, signal, sys; from minigpt import cli, hf\n"
            f"signal.signal({int(number)}, signal.{usual})\n"
            f"hf.write_tensors = lambda *_: os.kill(os.getpid(), {int(number)})\n"
            "cli.import_(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "out")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 128 + number and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_one_file_goes_before_an_index(saved, tmp_path):
    """As in transformers; an old index may have been left beside it."""
    folder = saved()
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}), "utf-8")
    cli.import_([str(folder), str(tmp_path / "out")])


def test_a_long_context_costs_neither_time_nor_memory(saved, tmp_path, monkeypatch):
    """Regression: the model's tables of angles were made anew for every tensor."""
    changed(folder := saved(), max_position_embeddings=1 << 20)
    made = []
    monkeypatch.setattr(RotaryPositions, "angles", staticmethod(made.append))
    cli.import_([str(folder), str(tmp_path / "out")])
    cli.export([str(tmp_path / "out"), str(tmp_path / "back")])
    assert not made


def test_bert_without_token_types(saved, tmp_path):
    changed(folder := saved("bert"), type_vocab_size=0)
    change_tensors(folder, lambda tensors: tensors.pop("bert.embeddings.token_type_embeddings.weight"))
    cli.import_([str(folder), str(tmp_path / "out")])
    assert minigpt.load(tmp_path / "out").model.token_types is None


def test_an_untied_bert_is_refused(saved, refused):
    folder = saved("bert")
    change_tensors(folder, lambda tensors: tensors.update({"cls.predictions.decoder.bias": torch.ones(53)}))
    assert "cls.predictions.decoder.bias is not the tensor that it is tied to" in refused(folder)


def test_several_files_and_names_without_a_prefix(saved, tmp_path):
    folder = saved("gpt2", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / hf.INDEX).exists()
    bare = {key.removeprefix("transformer."): value for file in folder.glob("*.safetensors")
            for key, value in load_file(file).items()}
    (other := tmp_path / "bare").mkdir()
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)    # the causal mask, which old files hold
    save_file(bare, other / hf.WEIGHTS)
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    for source in (folder, other):
        cli.import_([str(source), f"{source}.imported"])
    assert all(map(torch.equal, weights_of(f"{folder}.imported"), weights_of(f"{other}.imported")))


def test_old_files_of_bert(saved, tmp_path, capsys):
    """They name weight and bias of norms gamma and beta, hold a pooler, and positions as a tensor."""
    folder = saved("bert")
    cli.import_([str(folder), str(tmp_path / "new")])
    capsys.readouterr()

    def change(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
        tensors |= {"bert.pooler.dense.weight": torch.ones(24, 24), "cls.seq_relationship.bias": torch.ones(2),
                    "bert.embeddings.position_ids": torch.arange(16)[None],
                    "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}
    change_tensors(folder, change)
    cli.import_([str(folder), str(tmp_path / "old")])
    assert ("left out, as they serve another objective: bert.pooler.dense.weight, cls.seq_relationship.bias"
            in capsys.readouterr().err)
    assert all(map(torch.equal, weights_of(tmp_path / "new"), weights_of(tmp_path / "old")))


@pytest.mark.parametrize("architectures", [["BertForMaskedLM"], ..., None])
def test_a_bert_is_for_next_sentences_only_where_it_says_so(architectures, saved, tmp_path, capsys):
    """As bert-base-uncased, whose file has all tensors and whose settings name BertForMaskedLM."""
    cli.import_([str(saved("bert")), str(tmp_path / "plain")])
    changed(folder := saved("bert, next sentence"), architectures=architectures)
    capsys.readouterr()
    cli.import_([str(folder), str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'out'}: BertForMaskedLM, ")
    assert ("warning: left out, as they serve another objective: bert.pooler.dense.bias, bert.pooler.dense.weight, "
            "cls.seq_relationship.bias, cls.seq_relationship.weight\n") in printed.err
    run, plain = minigpt.load(tmp_path / "out"), minigpt.load(tmp_path / "plain")
    assert run.config == plain.config and run.config.objective.name == "masked"
    assert run.model.state_dict().keys() == plain.model.state_dict().keys()


def test_what_a_bert_for_next_sentences_must_hold(saved, refused, tmp_path, capsys):
    folder = saved("bert, next sentence")
    cli.import_([str(folder), str(tmp_path / "in")])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'in'}: BertForPreTraining, ")
    assert minigpt.load(tmp_path / "in").config.objective.name == "masked+next_sentence"
    for name in ("cls.seq_relationship.bias", "bert.pooler.dense.weight"):
        change_tensors(folder, lambda tensors, name=name: tensors.pop(name))
        assert f"{name} is missing; the settings tell of a model that has it" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_widened(dtype, saved, tmp_path):
    folder = saved()
    change_tensors(folder, lambda tensors: tensors.update({key: x.to(dtype) for key, x in tensors.items()}))
    cli.import_([str(folder), str(tmp_path / "out")])
    assert {x.dtype for x in weights_of(tmp_path / "out")} == {torch.float32}
    embedding = minigpt.load(tmp_path / "out").model.embedding.weight
    assert torch.equal(embedding, load_file(folder / hf.WEIGHTS)["model.embed_tokens.weight"].float())


def test_large_tensors_go_in_blocks(saved, tmp_path, monkeypatch):
    folder = saved("gpt2")
    cli.import_([str(folder), str(tmp_path / "one")])
    monkeypatch.setattr(hf, "BLOCK_BYTES", 300)
    cli.import_([str(folder), str(tmp_path / "two")])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize("keys, message", [
    (dict(model_type="mamba"), "model_type 'mamba' is not one that can be read: gpt2, llama, mistral, qwen2, qwen3, "
                               "bert"),
    (dict(model_type=...), "model_type None is not one"),
    (dict(hidden_size=...), "config.json: hidden_size is missing"),
    (dict(hidden_act="relu"), "hidden_act = 'relu' is not supported, only 'silu'"),
    (dict(attention_bias=True), "model.layers.0.self_attn.q_proj.bias is missing; the settings tell of a model that"),
    (dict(rope_parameters={"full_attention": {"rope_type": "linear"}}), "only one JSON object of plain values"),
    (dict(model_type=["llama"]), "model_type ['llama'] is not one that can be read"),
    (dict(layer_types=5, model_type="mistral", sliding_window=4),
     "config.json: a setting has a value of a wrong type"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope type 'yarn' is not supported, only default, linear and llama3"),
    (dict(rope_parameters={"rope_type": "linear"}), "config.json: factor is missing"),
    (dict(rope_parameters=..., rope_scaling="linear"), "rope_scaling = 'linear' is not supported, only"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is not supported"),
    (dict(hidden_size="wide"), "width takes a whole number, not 'wide'"),
    (dict(num_attention_heads=5), "num_heads = 5 is not a multiple of num_kv_heads = 2"),
    (dict(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing; the settings tell of a model that"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=[
        "full_attention", "sliding_attention"]), "layers with and without a sliding window are not supported"),
])
def test_settings_that_cannot_be_read(keys, message, saved, refused):
    changed(folder := saved(), **keys)
    assert message in refused(folder)


@pytest.mark.parametrize("name, keys, message", [
    ("gpt2", dict(activation_function="relu"),
     "activation 'relu' is not supported, only gelu_new, gelu_pytorch_tanh, gelu"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True is not supported"),
    ("bert", dict(position_embedding_type="relative_key"),
     "position_embedding_type = 'relative_key' is not supported, only 'absolute'"),
    ("bert", dict(tie_word_embeddings=False), "tie_word_embeddings = False is not supported, only True"),
    ("bert", dict(architectures=5), "config.json: a setting has a value of a wrong type"),
])
def test_settings_of_other_families_that_cannot_be_read(name, keys, message, saved, refused):
    changed(folder := saved(name), **keys)
    assert message in refused(folder)


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, DEFAULT_ROPE], ids=["linear", "llama3", "default"])
def test_rope_settings_of_transformers_4_and_5(rope, saved):
    theirs, ours = rope
    old = {key: value for key, value in theirs.items() if key != "rope_theta"}
    for keys in (dict(rope_parameters=theirs, rope_theta=...),
                 dict(rope_parameters=..., rope_theta=500.0, rope_scaling=old),
                 dict(rope_parameters=..., rope_theta=500.0,
                      rope_scaling={"type" if key == "rope_type" else key: value for key, value in old.items()})):
        changed(folder := saved(), **keys)
        config = hf.open_model(folder).model
        assert all(getattr(config, key) == value for key, value in ours.items())


@pytest.mark.parametrize("change, message", [
    (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing; the settings tell of a model"),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(23)}),
     "model.norm.weight is (23,), by its settings it must be (24,)"),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}),
     "model.norm.weight has type I8, which is not read, only F32, F16, BF16"),
    (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")),
     "model.safetensors: model.norm.weight holds a number that is not finite"),
    (lambda tensors: tensors.update({"model.layers.2.extra": torch.ones(1)}), "model.layers.2.extra is no part of the"),
    (lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(8, 24)}),
     "k_proj.weight is (8, 24), by its settings it must be (20, 24)"),
])
def test_tensors_that_do_not_fit(change, message, saved, refused):
    change_tensors(folder := saved(), change)
    assert message in refused(folder)


def test_files_that_cannot_be_read(saved, tmp_path, refused):
    folder = saved("gpt2", max_shard_size="20KB")
    index = json.loads((folder / hf.INDEX).read_text("utf-8"))
    names = sorted(set(index["weight_map"].values()))
    shard = folder / names[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert f"{shard}: not a safetensors file, or cut off" in refused(folder)
    shard.unlink()
    assert f"{shard}: missing, and named by {hf.INDEX}" in refused(folder)
    shard.write_bytes(content)
    os.mkfifo(folder / "pipe")
    for name, message in (("pipe", "pipe: not a file"), ("", "'' lies outside the directory, or is no name of a file"),
                          ("\ud800", "has a lone surrogate")):
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}), "utf-8")
        assert message in refused(folder)
    for outside in ("../x.safetensors", "/etc/x.safetensors", "..", "a/../x.safetensors"):
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": outside}}), "utf-8")
        assert f"{outside!r} lies outside the directory" in refused(folder)
    swapped = {tensor: names[-1] for tensor in index["weight_map"]}
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": swapped}), "utf-8")
    assert f"is not in {names[-1]}, which it names for it" in refused(folder)
    (folder / hf.INDEX).write_text("[]", "utf-8")
    assert "holds no weight_map of file names" in refused(folder)
    (folder / hf.INDEX).unlink()
    assert "no model.safetensors and no model.safetensors.index.json" in refused(folder)
    (folder / "config.json").write_text("{", "utf-8")
    assert "config.json: damaged, not JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json: No such file" in refused(folder)
    assert "no directory or file" in refused(tmp_path / "nowhere")


def test_a_tokenizer_from_elsewhere(saved, tmp_path, refused, capsys):
    folder = saved("gpt2")
    Tokenizer("bytes").save(tmp_path / "ours")
    (theirs := tmp_path / "tokenizer").mkdir()
    model = {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2}, "unk_token": "<s>"}
    special = dict(id=0, content="<s>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
               "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model}
    (theirs / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (theirs / "tokenizer_config.json").write_text('{"bos_token": "<s>"}', "utf-8")
    assert f"{tmp_path / 'ours'}: no tokenizer.json or vocab.json" in refused(folder, "--tokenizer",
                                                                               str(tmp_path / "ours"))
    cli.import_([str(folder), str(tmp_path / "in"), "--tokenizer", str(theirs)])
    assert capsys.readouterr().out.endswith("parameters, 3 tokens\n")
    assert minigpt.load(tmp_path / "in").tokenizer.encode("b a") == [2, 1]
    model["vocab"] |= {str(number): number for number in range(3, 54)}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}', "utf-8")
    assert "the tokenizer has 54 tokens and the model 53; they do not belong together" in refused(folder)


class Code:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_pickles_run_no_code(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "ckpt.pt"
    for write in (lambda content: torch.save(content, file), lambda content: file.write_bytes(pickle.dumps(content))):
        write({"model": {}, "model_args": Code()})
        assert f"{file}: " in refused(file) and not (tmp_path / "pwned").exists()
    torch.save({"model": {}, "model_args": Code()}, file)
    assert "a pickle of more than tensors and plain values, which could run code" in refused(file)


def test_files_that_are_no_checkpoint_of_nanogpt(tmp_path, refused):
    file = tmp_path / "ckpt.pt"
    arguments = dict(n_layer=1, n_head=2, n_embd=8, block_size=4, bias=True, vocab_size=9)
    for content, message in ((dict(a=1), "not a checkpoint of nanoGPT, which has model_args"),
                             ([1], "not a checkpoint of nanoGPT"), (dict(model=dict(a=1)), "checkpoint of nanoGPT"),
                             (dict(model={5: torch.ones(1)}, model_args=arguments), "checkpoint of nanoGPT"),
                             (dict(model={"x": torch.ones(2, 2).to_sparse()}, model_args=arguments), "of nanoGPT"),
                             (dict(model={}), "ckpt.pt: "), (dict(model={}, model_args={}), "vocab_size is missing"),
                             (dict(model={}, model_args=arguments), "wte.weight is missing")):
        torch.save(content, file)
        assert message in refused(file)
    torch.save({"model": {"x": torch.ones(1000)}}, file)
    file.write_bytes(file.read_bytes()[:-500])
    assert "ckpt.pt: not a file of torch.save, of its old format, or cut off" in refused(file)
    file.write_bytes(b"")
    assert "ckpt.pt: not a file of torch.save, of its old format, or cut off" in refused(tmp_path)


def test_a_run_is_exported_with_its_tokenizer_and_a_card(tmp_path, text_file, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    training.train(tiny_config(tmp_path, text_file, "--train.max_steps=4", "--model.mlp=swiglu"))
    out = tmp_path / "out"
    cli.export([str(tmp_path / "run"), str(out)])
    assert str(out) in capsys.readouterr().out
    run, prompt = minigpt.load(tmp_path / "run"), "The king shall"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == run.encode_prompt(prompt)
    made = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:]
    expected = run.generate(prompt, minigpt.SamplingParams(max_new_tokens=12, temperature=0.0))
    assert tokenizer.decode(made, skip_special_tokens=True) == expected and expected
    card = (out / "README.md").read_text("utf-8")
    assert "Qwen3ForCausalLM" in card and "4 steps, 512 tokens" in card and "val bpb on held-out text" in card
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert "exists already" in fails(capsys, cli.export, str(tmp_path / "run"), str(out))
    assert "no run or checkpoint" in fails(capsys, cli.export, str(tmp_path / "none"), str(tmp_path / "new"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_with_next_sentences_is_exported(tmp_path, capsys):
    """And one that pools otherwise, or has learnt labels, is not."""
    from transformers import AutoModelForPreTraining, AutoTokenizer

    (texts := tmp_path / "texts").mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(make_text(9, seed=number), "utf-8")
    bert = [f"--model.{setting}" for setting in (
        "mlp=gelu_erf", "norm=layer_norm", "norm_position=post", "embedding_norm=true", "head_transform=true",
        "position=learned", "qk_norm=false", "bias=true")]
    training.train(tiny_config(tmp_path, texts, "--train.max_steps=2", "--objective.name=masked+next_sentence", *bert))
    run, out = tmp_path / "run", tmp_path / "out"
    capsys.readouterr()
    cli.export([str(run), str(out)])
    assert capsys.readouterr().out.startswith(f"{out}: BertForPreTraining, ")
    assert 'model = AutoModelForPreTraining.from_pretrained("out")' in (out / "README.md").read_text("utf-8")
    theirs, ours = AutoModelForPreTraining.from_pretrained(out), minigpt.load(run).model
    tokens = torch.arange(5, 25).view(2, 10)
    output, hidden = theirs(tokens), ours.hidden(tokens, causal=False)
    assert_close(ours.head(hidden), output.prediction_logits, 1e-5)
    assert_close(ours.next_sentence_logits(hidden, torch.full((2,), 10)), output.seq_relationship_logits, 1e-5)
    vocabulary = minigpt.load(run).tokenizer
    pair = [tuple(map(vocabulary.encode, ("the King said", " of night"))), (vocabulary.encode("a day"), None)]
    for texts, wanted in ((("the King said", " of night"), pair[:1]), (("a day",), pair[1:])):
        row, found = text_rows(wanted, 32, vocabulary), AutoTokenizer.from_pretrained(out)(*texts)
        assert [found["input_ids"]] == row["inputs"].tolist()
        assert [found["token_type_ids"]] == row["token_types"].tolist()
    for settings, named in ((dict(pooling="last"), "model.pooling = 'last'"),
                            (dict(num_classes=3), "model.num_classes = 3")):
        with pytest.raises(Unsupported, match=f"{named} has no counterpart in bert"):
            hf.write_model(tmp_path, replace(ours.config, **settings), "masked+next_sentence", None)


def test_the_tokenizer_of_a_qwen2_of_ours(tmp_path, text_file, capsys):
    """transformers splits the texts of such a model in Qwen's way, whatever its tokenizer.json says: export warns."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    training.train(tiny_config(tmp_path, text_file, "--train.max_steps=1", "--model.mlp=swiglu",
                               "--model.qk_norm=false", "--model.qkv_bias=true"))
    capsys.readouterr()
    cli.export([str(tmp_path / "run"), str(tmp_path / "out")])
    assert "load it with PreTrainedTokenizerFast.from_pretrained" in capsys.readouterr().err
    text = "the King  of night"
    ids = minigpt.load(tmp_path / "run").encode_prompt(text)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").encode(text) == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(text) != ids, "then the warning can go"


def test_what_is_no_run(saved, capsys):
    folder = saved()
    capsys.readouterr()
    assert "in Hugging Face's form and no run; `minigpt import`" in fails(capsys, cli.verify, str(folder))
    assert "`minigpt import` makes one" in fails(capsys, cli.sample, str(folder))


def test_what_no_family_has_is_not_exported(tmp_path, text_file, capsys):
    training.train(tiny_config(tmp_path, text_file, "--train.max_steps=1"))
    before = sorted(tmp_path.iterdir())
    line = fails(capsys, cli.export, str(tmp_path / "run"), str(tmp_path / "out"))
    assert "model.mlp = 'squared_relu' has no counterpart in qwen3" in line
    assert sorted(tmp_path.iterdir()) == before
