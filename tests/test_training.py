"""The loop: it learns, logs, evaluates, keeps and stops as the config says, and no bad number reaches the weights."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import slow
from tiny import make_text, tiny_config

from minigpt import checkpoint, engine, training
from minigpt.config import load_config
from minigpt.optim import schedule


def run_lines(config, **options):
    out = io.StringIO()
    closing = training.train(config, out=out, **options)
    return closing, out.getvalue().splitlines()


def metrics_of(config):
    with open(f"{config.train.run_dir}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def saved_steps(run):
    return [int(path.name[5:]) for path in reversed(checkpoint.in_run(run))]


@pytest.mark.parametrize("objective, optimizer", [
    ("causal", "muon"), ("masked", "adamw"), slow("causal", "adamw"),
    slow("masked", "muon")])
def test_it_learns(tmp_path, text_file, objective, optimizer):
    """The validation loss ends well below that of guessing every token by its frequency alone."""
    steps = {"causal": 120, "masked": 300}[objective]   # a masked row has a seventh of the targets
    config = tiny_config(tmp_path, text_file, f"--objective.name={objective}", f"--optim.name={optimizer}",
                         f"--train.max_steps={steps}", f"--train.eval_every={steps // 2}", "--train.batch_size=16",
                         "--optim.learning_rate=0.01")
    closing, _ = run_lines(config)
    val_loss = [record["val_loss"] for record in metrics_of(config) if "val_loss" in record]
    run = engine.load(tmp_path / "run")
    counts = torch.bincount(torch.tensor(run.tokenizer.encode(text_file.read_text("utf-8")))).double()
    frequencies = counts[counts > 0] / counts.sum()
    unigram = -(frequencies * frequencies.log()).sum().item()
    assert len(val_loss) == 2 and val_loss[-1] < (0.6 if objective == "causal" else 0.9) * unigram
    unit = "bits per byte" if objective == "causal" else "nats per target"
    more = "" if objective == "causal" else r", masked accuracy 0\.\d{4}"
    assert re.fullmatch(rf"final: \d\.\d{{4}} {unit}{more}", closing), closing


def test_metrics_have_their_keys_and_the_closing_line_their_last_number(tmp_path, text_file):
    config = tiny_config(tmp_path, text_file)
    closing, _ = run_lines(config)
    records = metrics_of(config)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["tokens"] for record in records] == [step * 4 * 32 for step in range(1, 13)]
    for record in records:
        assert record["causal"] == record["train_loss"]
        assert {"train_loss", "lr", "grad_norm", "tokens_per_second", "elapsed_seconds"} <= record.keys()
        assert record["lr"] == pytest.approx(
            schedule(record["step"] - 1, 12, config.optim) * config.optim.learning_rate)
    assert [record["step"] for record in records if "val_bpb" in record] == [6, 12]
    assert closing == f"final: {records[-1]['val_bpb']:.4f} bits per byte"
    elapsed = [record["elapsed_seconds"] for record in records]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0


def test_samples_are_logged_at_every_evaluation(tmp_path, text_file):
    config = tiny_config(tmp_path, text_file, '--train.sample_prompts=["The king", "A"]', "--train.sample_tokens=5")
    run_lines(config)
    records = [json.loads(line) for line in open(tmp_path / "run/samples.jsonl", encoding="utf-8")]
    assert [(record["step"], record["prompt"]) for record in records] == [
        (6, "The king"), (6, "A"), (12, "The king"), (12, "A")]
    assert any(record["text"] for record in records)


def test_sampling_and_evaluating_change_nothing_in_the_training(tmp_path, text_file):
    """Evaluations draw nothing from the generator that dropout draws from."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    run_lines(tiny_config(one, text_file, "--model.dropout=0.2", "--train.eval_every=12"))
    run_lines(tiny_config(other, text_file, "--model.dropout=0.2", "--train.eval_every=2",
                          '--train.sample_prompts=["The"]'))
    path = "run/checkpoints/step-00000012/model.safetensors"
    assert (one / path).read_bytes() == (other / path).read_bytes()


def test_last_checkpoints_and_the_best_are_kept(tmp_path, text_file, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 1.5, 1.2])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: {"val_loss": next(losses), "val_bpb": 1.0})
    config = tiny_config(tmp_path, text_file, "--train.eval_every=2", "--train.checkpoint_every=1",
                         "--train.keep_last=2")
    run_lines(config)
    assert saved_steps(tmp_path / "run") == [4, 11, 12]
    assert checkpoint.find(tmp_path / "run").state["loop"]["best_step"] == 4


def test_early_stopping(tmp_path, text_file, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.5])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: {"val_loss": next(losses), "val_bpb": 1.0})
    config = tiny_config(tmp_path, text_file, "--train.eval_every=2", "--train.early_stopping=2")
    _, lines = run_lines(config)
    assert metrics_of(config)[-1]["step"] == 8
    assert saved_steps(tmp_path / "run")[-1] == 8
    _, lines = run_lines(config, resume=True)
    assert "is finished: step 8" in lines[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_too(tmp_path, text_file, dtype):
    """float16 goes through the loss scaler, whose state is saved and restored."""
    config = tiny_config(tmp_path, text_file, f"--train.dtype={dtype}", "--train.max_steps=30")
    run_lines(config)
    losses = [record["train_loss"] for record in metrics_of(config)]
    assert losses[-1] < 0.9 * losses[0]
    assert checkpoint.find(tmp_path / "run").state["dtype"] == dtype
    config = tiny_config(tmp_path, text_file, f"--train.dtype={dtype}", "--train.max_steps=32")
    run_lines(config, resume=True)
    assert metrics_of(config)[-1]["step"] == 32


def test_compiled_and_plain_training_agree(tmp_path, text_file, monkeypatch):
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: plain_compile(function, backend="aot_eager"))
    losses = {}
    for name in ("true", "false"):
        (tmp_path / name).mkdir()
        config = tiny_config(tmp_path / name, text_file, f"--train.compile={name}")
        run_lines(config)
        losses[name] = [record["train_loss"] for record in metrics_of(config)]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)


def test_a_compiler_that_fails_is_done_without(tmp_path, text_file, monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    closing, lines = run_lines(tiny_config(tmp_path, text_file, "--train.compile=true"))
    assert sum("torch.compile does not work here" in line for line in lines) == 1
    assert closing.startswith("final: ")


def test_a_run_is_not_written_over(tmp_path, text_file):
    config = tiny_config(tmp_path, text_file)
    closing, _ = run_lines(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="not empty; go on with --resume"):
        run_lines(config)
    again, lines = run_lines(config, resume=True)
    assert again == closing and "is finished: step 12" in lines[0]
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_what_a_kill_left_of_a_finished_run_goes(tmp_path, text_file):
    """Killed after its last save, before older checkpoints were deleted, a run kept them for ever."""
    run_lines(tiny_config(tmp_path, text_file, "--train.keep_last=3"))
    (tmp_path / "run/checkpoints/.unfinished").mkdir()
    _, lines = run_lines(tiny_config(tmp_path, text_file, "--train.keep_last=1"), resume=True)
    assert "is finished" in lines[0] and os.listdir(tmp_path / "run/checkpoints") == ["step-00000012"]


def test_a_foreign_directory_is_refused(tmp_path, text_file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        run_lines(tiny_config(tmp_path, text_file))
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("change", ["--model.depth=1", "--train.seed=2", "--tokenizer.vocab_size=310",
                                    "--optim.name=adamw", "--objective.name=masked", "--train.batch_size=2"])
def test_resume_refuses_the_settings_of_another_run(tmp_path, text_file, change):
    run_lines(tiny_config(tmp_path, text_file))
    key = change[2:].split("=")[0]
    with pytest.raises(ValueError, match=f"{key} = .* was begun with"):
        run_lines(tiny_config(tmp_path, text_file, "--train.max_steps=20", change), resume=True)


def test_resume_refuses_another_text(tmp_path, text_file):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    run_lines(tiny_config(tmp_path, text))
    text.write_text(make_text(1500, seed=5))
    with pytest.raises(ValueError, match="text or the tokenizer .* is not the one this run began with"):
        run_lines(tiny_config(tmp_path, text, "--train.max_steps=20"), resume=True)


def test_resume_takes_the_same_text_from_another_place(tmp_path, text_file):
    run_lines(tiny_config(tmp_path, text_file))
    (tmp_path / "moved.txt").write_bytes(text_file.read_bytes())
    config = tiny_config(tmp_path, tmp_path / "moved.txt", "--train.max_steps=14")
    run_lines(config, resume=True)
    assert metrics_of(config)[-1]["step"] == 14


def test_resume_refuses_another_split_of_the_text(tmp_path, text_file):
    """Held-out text of the first part of a run would be training text of the second."""
    run_lines(tiny_config(tmp_path, text_file, "--tokenizer.kind=bytes"))
    with pytest.raises(ValueError, match="text or the tokenizer .* is not the one this run began with"):
        run_lines(tiny_config(tmp_path, text_file, "--tokenizer.kind=bytes", "--train.max_steps=20",
                              "--data.val_fraction=0.05"), resume=True)


def test_a_longer_run_goes_on_from_the_end_of_a_shorter(tmp_path, text_file):
    run_lines(tiny_config(tmp_path, text_file))
    config = tiny_config(tmp_path, text_file, "--train.max_steps=20")
    _, lines = run_lines(config, resume=True)
    assert "going on from" in lines[0]
    assert [record["step"] for record in metrics_of(config)] == list(range(1, 21))


def test_logs_are_cut_back_to_the_checkpoint(tmp_path, text_file):
    config = tiny_config(tmp_path, text_file, "--train.max_steps=8")
    run_lines(config)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train_loss": 1.0}\n{"step": 10, "trai')
    config = tiny_config(tmp_path, text_file, "--train.max_steps=10")
    run_lines(config, resume=True)
    assert [record["step"] for record in metrics_of(config)] == list(range(1, 11))
    assert "grad_norm" in metrics_of(config)[8]


def test_a_context_longer_than_the_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("To be or not to be. " * 3)
    with pytest.raises(ValueError, match="fewer than one context"):
        run_lines(tiny_config(tmp_path, tmp_path / "short.txt", "--tokenizer.kind=bytes",
                              "--model.context_length=128"))


def test_unknown_device_and_kernels_that_cannot_run(tmp_path, text_file):
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        run_lines(tiny_config(tmp_path, text_file, "--train.device=gpu"))
    with pytest.raises(ValueError, match="triton"):
        run_lines(tiny_config(tmp_path, text_file, "--train.kernels=triton"))


def test_a_run_that_another_process_holds_is_refused(tmp_path, text_file):
    """Two processes wrote into one run; the lock goes with the process, however it ends."""
    config = tiny_config(tmp_path, text_file)
    code = f"import time; from pathlib import Path; from minigpt.files import held\n" \
           f"with held(Path({str(tmp_path / 'run')!r})):\n print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": str(Path(training.__file__).parent.parent)})
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use by another process"):
        run_lines(config)
    holder.kill()
    holder.communicate()
    assert run_lines(config)[0].startswith("final: ")


def test_a_damaged_checkpoint_crowds_out_none_that_is_whole(tmp_path, text_file):
    """A damaged newest checkpoint counted as one of those to keep, and whole ones were deleted in its place."""
    run_lines(tiny_config(tmp_path, text_file))
    damaged = tmp_path / "run/checkpoints/step-00000012/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    copy = tmp_path / "run/checkpoints/step-backup"
    copy.mkdir()
    run_lines(tiny_config(tmp_path, text_file, "--train.max_steps=14", "--train.eval_every=14",
                          "--train.checkpoint_every=4", "--train.keep_best=false"), resume=True)
    assert saved_steps(tmp_path / "run") == [12, 14] and copy.is_dir()
    assert (tmp_path / "run/checkpoints/step-00000012.damaged").is_dir()


def test_an_evaluation_that_was_interrupted_is_made_up_for(tmp_path, text_file, monkeypatch):
    """It was made on resume, yet never reached metrics.jsonl."""
    straight = tmp_path / "straight"
    straight.mkdir()
    run_lines(tiny_config(straight, text_file))

    def interrupt(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        raise training.Stopped

    config = tiny_config(tmp_path, text_file)
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", interrupt)
        with pytest.raises(training.Interrupted) as stopped:
            run_lines(config)
    assert stopped.value.exit_code == 130 and saved_steps(tmp_path / "run") == [4, 6]
    closing, lines = run_lines(config, resume=True)
    assert "nan" not in "".join(lines)
    times = ("elapsed_seconds", "tokens_per_second")
    records, wanted = ([{key: value for key, value in record.items() if key not in times}
                        for record in metrics_of(made)] for made in (config, tiny_config(straight, text_file)))
    assert records == wanted
    again, lines = run_lines(config, resume=True)
    assert again == closing and "is finished" in lines[0]


def test_an_evaluation_that_was_made_up_for_is_logged_once(tmp_path, text_file, monkeypatch):
    """Killed after the evaluation that it owed and before the next checkpoint, the run logged it once more."""
    options = ["--train.keep_best=false", "--train.checkpoint_every=5", '--train.sample_prompts=["A"]']
    config = tiny_config(tmp_path, text_file, *options)

    def interrupt(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise training.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", interrupt)
        with pytest.raises(training.Interrupted):
            run_lines(config)
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_lines(config, resume=True)
    assert metrics_of(config)[-1]["step"] == 6
    run_lines(config, resume=True)
    assert [record["step"] for record in metrics_of(config)] == list(range(1, 13))
    samples = (tmp_path / "run/samples.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in samples] == [6, 12]


def test_a_run_within_its_own_text_is_refused(tmp_path, text_file):
    """Its logs were training text, which changed, and it could not be resumed."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(text_file.read_text())
    with pytest.raises(ValueError, match="lies in data.path"):
        run_lines(tiny_config(tmp_path, texts, f"--train.run_dir={texts / 'runs/one'}"))
    assert not (texts / "runs").exists()


def test_a_lost_config_is_restored(tmp_path, text_file):
    run_lines(tiny_config(tmp_path, text_file))
    (tmp_path / "run/config.json").unlink()
    run_lines(tiny_config(tmp_path, text_file, "--train.max_steps=13"), resume=True)
    assert (tmp_path / "run/config.json").exists() and saved_steps(tmp_path / "run")[-1] == 13


def test_a_run_that_is_cut_short_is_evaluated_where_it_ends(tmp_path, text_file):
    """With max_steps lowered to a step that had not been evaluated, resume failed for want of a last number."""
    run_lines(tiny_config(tmp_path, text_file, "--train.eval_every=100"))
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000012")
    closing, _ = run_lines(tiny_config(tmp_path, text_file, "--train.max_steps=8"), resume=True)
    assert closing == f"final: {metrics_of(tiny_config(tmp_path, text_file))[-1]['val_bpb']:.4f} bits per byte"


def test_an_early_stopped_run_goes_on_with_more_patience(tmp_path, text_file, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: {"val_loss": next(losses), "val_bpb": 1.0})
    options = ["--train.eval_every=2", "--train.early_stopping="]
    run_lines(tiny_config(tmp_path, text_file, options[0], options[1] + "1"))
    _, lines = run_lines(tiny_config(tmp_path, text_file, options[0], options[1] + "1"), resume=True)
    assert "is finished: step 4; a larger train.early_stopping goes on" in lines[0]
    run_lines(tiny_config(tmp_path, text_file, options[0], options[1] + "3"), resume=True)
    assert saved_steps(tmp_path / "run")[-1] == 8


def test_a_float32_run_goes_on_in_float16(tmp_path, text_file):
    """The loss scaler of a float32 run has no state, and loading that failed."""
    run_lines(tiny_config(tmp_path, text_file, "--train.dtype=float32"))
    config = tiny_config(tmp_path, text_file, "--train.dtype=float16", "--train.max_steps=14")
    run_lines(config, resume=True)
    assert metrics_of(config)[-1]["step"] == 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty documents, of which three are held out."""
    path = tmp_path_factory.mktemp("documents")
    for number in range(30):
        (path / f"{number}.txt").write_text(make_text(25, seed=number), "utf-8")
    return path


@pytest.mark.parametrize("objective", [
    ["--objective.name=masked+next_sentence,causal:0.5+next_sentence@6", "--objective.mask_unit=span"],
    ["--objective.name=next_sentence,masked@3", "--objective.mask_unit=word", "--train.best_by=val_masked_accuracy"]])
def test_every_objective_goes_on_as_if_never_stopped(tmp_path, folder, objective):
    """From checkpoints before, at and behind a change of the objective, to the last byte."""
    config = tiny_config(tmp_path, folder, "--train.checkpoint_every=1", "--train.keep_last=20",
                         "--model.dropout=0.1", "--train.accumulation_steps=2", "--train.eval_every=4", *objective)
    run, kept = tmp_path / "run", tmp_path / "kept"
    closing, _ = run_lines(config)
    wanted = (run / "checkpoints/step-00000012/model.safetensors").read_bytes()
    logged = [{key: value for key, value in record.items() if "second" not in key} for record in metrics_of(config)]
    run.rename(kept)
    for step in (2, 5, 6, 9):
        shutil.copytree(kept, run)
        for path in checkpoint.in_run(run):
            if checkpoint.step_of(path) > step:
                checkpoint.delete(path)
        assert run_lines(config, resume=True)[0] == closing
        assert (run / "checkpoints/step-00000012/model.safetensors").read_bytes() == wanted
        assert [{key: value for key, value in record.items() if "second" not in key}
                for record in metrics_of(config)] == logged
        shutil.rmtree(run)
    parts = [{"masked", "causal", "next_sentence"} & record.keys() for record in logged]
    assert len(set(map(frozenset, parts))) == 2, "each part is logged by its name while it is trained"


def test_a_change_of_the_objective_is_no_spike(tmp_path, text_file):
    config = tiny_config(tmp_path, text_file, "--objective.name=causal,causal:30@25", "--train.spike_bound=2",
                         "--train.max_steps=60")
    run_lines(config)
    records = metrics_of(config)
    assert records[-1]["rollbacks"] == 0 and records[30]["train_loss"] > 10 * records[20]["train_loss"]


START = ["--optim.learning_rate=0", "--optim.muon_learning_rate=0", "--optim.weight_decay=0", "--train.max_steps=2"]


def test_a_run_starts_from_another(tmp_path, folder):
    """With all of its weights, tokenizer and settings of the model; heads that it lacks are new. It goes on when what
    it started from is gone."""
    first = tiny_config(tmp_path, folder, "--model.mlp=swiglu", "--tokenizer.vocab_size=310", "--train.seed=7")
    run_lines(first)
    (tmp_path / "run").rename(tmp_path / "first")
    (tmp_path / "next.toml").touch()
    words = [str(tmp_path / "next.toml"), *START, f"--data.path={folder}", f"--train.run_dir={tmp_path / 'run'}",
             "--objective.name=next_sentence", f"--train.start_from={tmp_path / 'first'}", "--train.batch_size=4"]
    config = load_config(words[0], words[1:])
    assert (config.model.mlp, config.model.width, config.model.pooling) == ("swiglu", 32, "last")
    _, lines = run_lines(config)
    assert any(line.startswith("starting from ") and "new are token_types.weight, pooler.dense.weight" in line
               for line in lines)
    before, after = engine.load(tmp_path / "first"), engine.load(tmp_path / "run")
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    weights = dict(after.model.named_parameters())
    for name, weight in before.model.named_parameters():
        assert torch.equal(weight, weights.pop(name)), name
    assert {name.partition(".")[0] for name in weights} == {"token_types", "pooler", "next_sentence"}
    shutil.rmtree(tmp_path / "first")
    config = load_config(words[0], [*words[1:], "--train.max_steps=4"])
    _, lines = run_lines(config, resume=True)
    assert any("going on from" in line for line in lines) and metrics_of(config)[-1]["step"] == 4


def test_what_a_run_cannot_start_from(tmp_path, folder):
    run_lines(tiny_config(tmp_path, folder))
    (tmp_path / "run").rename(tmp_path / "first")
    (tmp_path / "next.toml").touch()
    start = f"--train.start_from={tmp_path / 'first'}"

    def error_of(*more):
        with pytest.raises(ValueError) as raised:
            run_lines(load_config(tmp_path / "next.toml", [
                f"--data.path={folder}", f"--train.run_dir={tmp_path / 'new'}", *more]))
        return str(raised.value)

    assert error_of("--train.start_from=nowhere") == (
        "command line: train.start_from: no run or checkpoint nowhere; name a directory that train.py made")
    assert "model.preset does not go with train.start_from" in error_of(start, "--model.preset=tiny")
    assert "tokenizer.path does not go with train.start_from" in error_of(start, "--tokenizer.path=t")
    assert "leave out of [model] what train.start_from decides" in error_of(start, "--model.width=48")
    assert "is not part of the model" in error_of(start, "--model.depth=1")
    assert error_of(start, "--train.best_by=val_f1") == (
        "train.best_by = 'val_f1' is nothing that an evaluation gives here: val_loss, val_causal, val_bpb")


def test_the_best_can_be_the_highest(tmp_path, folder):
    """keep_best and early stopping go by the accuracy, though the loss says otherwise."""
    config = tiny_config(tmp_path, folder, "--objective.name=masked", "--train.best_by=val_masked_accuracy",
                         "--train.max_steps=40", "--train.eval_every=2", "--train.checkpoint_every=100",
                         "--train.keep_last=1", "--optim.learning_rate=0.02")
    run_lines(config)
    found = {record["step"]: record for record in metrics_of(config) if "val_loss" in record}
    best = max(found, key=lambda step: (found[step]["val_masked_accuracy"], -step))
    assert saved_steps(tmp_path / "run") == sorted({best, 40})
    assert best != min(found, key=lambda step: found[step]["val_loss"]) or best != 40


def test_a_part_that_would_never_begin_is_refused(tmp_path, text_file):
    with pytest.raises(ValueError, match="its last part would begin at step 12, and train.max_steps = 12"):
        run_lines(tiny_config(tmp_path, text_file, "--objective.name=masked,causal@12"))


def test_early_stopping_waits_for_the_last_part(tmp_path, text_file):
    """Regression: the loss of what was not trained yet did not fall, and the run stopped before it began."""
    config = tiny_config(tmp_path, text_file, "--objective.name=masked,causal@18", "--train.max_steps=22",
                         "--train.eval_every=2", "--train.early_stopping=1", "--train.checkpoint_every=100",
                         "--optim.learning_rate=0.02")
    run_lines(config)
    assert metrics_of(config)[-1]["step"] > 18


def test_one_document_is_refused_before_training_begins(tmp_path, text_file):
    with pytest.raises(ValueError, match="needs two documents with two sentences each"):
        run_lines(tiny_config(tmp_path, text_file, "--objective.name=masked+next_sentence"))
    assert not (tmp_path / "run/metrics.jsonl").exists()
