"""Misuse: whatever a user gets wrong ends with exit code 2 and one line that names the fault and its mend.

A row is a name, the shell commands that prepare the fault, the command at fault, and parts of its one line, in order,
between "...". Every row begins in a folder of its own that holds `words.txt`, `tiny.toml`, which trains a tiny model on
it in `run`, and `done`, which is such a run that has ended; `masked` is one of the masked objective. Nothing in that
folder may change.
"""

import contextlib
import ctypes
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY

from minigpt import cli, sampling
from minigpt.config import SamplingParams

ROOT = Path(__file__).parent.parent
COMMANDS = {"train": cli.train, "sample": cli.sample, "minigpt": cli.main}

FILES = [
    ("no config file", "", "train none.toml", "no config file none.toml; name a TOML file"),
    ("a config that is a folder", "", "train done", "no config file done; name a TOML file"),
    ("a config that is a pipe", "mkfifo a.toml", "train a.toml", "no config file a.toml; name a TOML file"),
    ("a config's name too long", "", "train " + "x" * 300, "xxx: File name too long; name a shorter one"),
    ("a config that may not be read", "chmod 0 tiny.toml", "train tiny.toml",
     "tiny.toml: Permission denied; change its"),
    ("a latin-1 config", r"""printf 'data.path = "\351"' > a.toml""", "train a.toml",
     "a.toml: byte 13 is not UTF-8; save the file as UTF-8 text"),
    ("a UTF-16 config", r"printf '\377\376[\0' > a.toml", "train a.toml", "a.toml: byte 0 is not UTF-8; save"),
    ("a binary config", "cp done/checkpoints/*12/model.safetensors a.toml", "train a.toml",
     "a.toml: byte ... is not UTF-8"),
    ("a NUL in a config", r"printf '[train]\nseed\0 = 1' > a.toml", "train a.toml",
     "a.toml: not valid TOML: ...line 2"),
    ("a NUL in a value", r"""printf 'train.run_dir = "a\\u0000"' > a.toml""", "train a.toml",
     r"a.toml:1: train.run_dir = 'a\x00' has a NUL character; leave it out"),
    ("no TOML", "echo 'seed: 1' > a.toml", "train a.toml", "a.toml: not valid TOML: ...line 1"),
    ("deep TOML", r"(printf a=; head -c 99999 /dev/zero | tr '\0' '[') > a.toml", "train a.toml",
     "a.toml: nested too deeply"),
    ("deep JSON", r"head -c 99999 /dev/zero | tr '\0' '[' > a.json", "train a.json", "a.json: nested too deeply"),
    ("an empty JSON file", "touch a.json", "train a.json", "a.json: not valid JSON: ...line 1"),
    ("a JSON list", "echo '[]' > a.json", "train a.json", "a.json: holds no sections; a run's config.json is"),
    ("a number for a section", """echo '{"model": 3}' > a.json""", "train a.json",
     "a.json: model stands outside a section; sections are [data]"),
    ("a JSON key twice", """echo '{"train": {"seed": 1, "seed": 2}}' > a.json""", "train a.json",
     "a.json: not valid JSON: 'seed' stands twice in one object; keep one"),
    ("a TOML key twice", r"printf 'train.seed = 1\ntrain.seed = 2\n' > a.toml", "train a.toml",
     "a.toml: not valid TOML: Cannot overwrite a value (at line 2"),
    ("a JSON value of a wrong type", """echo '{"train": {"seed": [1]}}' > a.json""", "train a.json",
     "a.json: train.seed takes a whole number, not [1]"),
    ("5000 digits in a file", "(printf train.seed=1; printf %05000d 0) > a.toml", "train a.toml",
     "a.toml: not valid TOML: ...4300 digits"),
    ("a key outside a section", "echo seed = 1 > a.toml", "train a.toml", "a.toml: seed stands outside a section"),
    ("a misspelt section", r"printf '\n[trian]\nseed = 1' > a.toml", "train a.toml",
     "a.toml:3: unknown section [trian]; did you mean train?"),
    ("a misspelt key", r"printf '[train]\n\nsed = 1' > a.toml", "train a.toml",
     "a.toml:3: unknown key train.sed; did you mean seed?"),
    ("a misspelt preset", """echo 'model.preset = "gpt3"' > a.toml""", "train a.toml",
     "a.toml:1: unknown preset 'gpt3'; there are tiny"),
    ("a run directory that is a file", "touch a", "train tiny.toml --train.run_dir=a", "a is a file; name another"),
    ("a run directory below a file", "touch a", "train tiny.toml --train.run_dir=a/b",
     "a/b: Not a directory; a file stands"),
    ("a run directory with something in it", "mkdir a; touch a/b", "train tiny.toml --train.run_dir=a",
     "a is not empty; go on with --resume, or name another train.run_dir"),
    ("a run directory of another run", "", "train tiny.toml --train.run_dir=done",
     "done is not empty; go on with --resume"),
    ("a run directory that may not be made", "mkdir -m 500 a", "train tiny.toml --train.run_dir=a/run",
     "a/run: Permission denied; change its permissions or name another"),
    ("a run directory that may not be written", "mkdir a; mkdir -m 500 a/b; chmod 500 a",
     "train tiny.toml --train.run_dir=a/b",
     "a/b/...: Permission denied; change its permissions or name another"),
    ("a run directory's name too long", "", "train tiny.toml --train.run_dir=" + "x" * 300,
     "xxx: File name too long; name a shorter one"),
    ("a cache that is a file", "touch a", "train tiny.toml --data.cache_dir=a",
     "a...: Not a directory; a file stands where a directory should, so name another"),
    ("a cache that may not be written", "mkdir -m 500 a", "train tiny.toml --data.cache_dir=a",
     "a...: Permission denied"),
    ("a cache in the home of nobody", "", "train tiny.toml --data.cache_dir=~nobody-here/x",
     "data.cache_dir = '~nobody-here/x': there is no such home directory; write the"),
]

SETTINGS = [
    ("--resmue", "'--resmue' is not understood; settings are written --section.key=value"),
    ("other.toml", "'other.toml' is not understood; settings are written"),
    ("--resume=yes", "argument --resume: ignored explicit argument 'yes'; train.py --help"),
    ("--train.seed", "'--train.seed' is not understood; write it as --train.seed=VALUE"),
    ("--train.seed 5", "'--train.seed' is not understood; write it as --train.seed=VALUE"),
    ("--model.dept=3", "unknown key model.dept; did you mean depth?"),
    ("--modle.depth=3", "unknown section [modle]; did you mean model?"),
    ("--model.preset=tniy", "unknown preset 'tniy'; there are tiny"),
    ("--train.max_steps=many", "train.max_steps takes a whole number, not 'many'"),
    ("--train.max_steps=", "train.max_steps takes a whole number, not ''"),
    ("--train.seed=null", "train.seed takes a whole number, not None"),
    ("--model.depth=2.5", "model.depth takes a whole number, not 2.5"),
    ("--model.depth=true", "model.depth takes a whole number, not True"),
    ("--model.bias=1", "model.bias takes true or false, not 1"),
    ("--data.include=*.py", "data.include takes a list of strings, not '*.py'"),
    ("--train.batch_size=0", "train.batch_size = 0 is too small; the least is 1"),
    ("--model.dropout=1.0", "model.dropout = 1.0 is too large; the most is 0.99"),
    ("--optim.learning_rate=-1", "optim.learning_rate = -1.0 is too small; the least is 0"),
    ("--optim.muon_learning_rate=1e300", "optim.muon_learning_rate = 1e+300 is too large; the most is 1000"),
    ("--model.init_std=1e300", "model.init_std = 1e+300 is too large; the most is 1000"),
    ("--optim.eps=nan", "optim.eps = nan is not a finite number"),
    ("--optim.beta1=-inf", "optim.beta1 = -inf is not a finite number"),
    ("--optim.grad_clip=1e999", "optim.grad_clip = inf is not a finite number"),
    (f"--train.max_steps={10**30}", "train.max_steps is a whole number beyond 4611686018427387904; write a smaller"),
    (f"--train.max_steps=0x{'f' * 5000}", "train.max_steps is a whole number beyond"),
    (f"--train.seed={'9' * 5000}", "train.seed takes a whole number, not '999"),
    ("--train.sample_tokens=99999999", "train.sample_tokens = 99999999 is too large; the most is 10000000"),
    ("""'--train.sample_prompts=[""]'""", "sample_prompts holds ''; each must be some text"),
    ("--optim.name=sgd", "optim.name = 'sgd' is none of: muon, adamw"),
    ("--model.width=33", "command line: tiny.toml:5: [model] width = 33 is not a multiple of num_heads = 2; change"),
    ("--model.head_size=7", "head_size = 7 is odd; ...make it even"),
    ("--model.num_kv_heads=3", "num_heads = 2 is not a multiple of num_kv_heads = 3; change one of them"),
    ("--model.context_length=99999",
     "fewer than one context of 100000; give more text or a smaller model.context_length"),
    ("--tokenizer.vocab_size=100000",
     "words.txt: vocab_size = 100000 is too large for this text...; possible are 262 to"),
    ("--tokenizer.vocab_size=261", "tokenizer.vocab_size = 261 is too small; the least is 262"),
    ("--model.vocab_size=280", "model.vocab_size = 280 is less than the tokenizer's 300"),
    ("--train.device=gpu", "device 'gpu' cannot be used: ...; take auto, cpu or"),
    ("--train.device=meta", "device 'meta' cannot be used: ...; take auto, cpu or"),
    ("--train.device=hpu", "device 'hpu' cannot be used: ...; take auto, cpu or"),
    ("--train.device=cuda:99", "device 'cuda:99' cannot be used: ...; take auto, cpu or"),
    ("--train.kernels=triton", "kernels = triton: ...; take auto or reference"),
    ("--data.path=", "path is empty; name a file or folder of text"),
    ("--data.path=none", "data.path = 'none': no such file or folder; name a file or folder of UTF-8 text"),
    ("--data.path=~nobody-here/x", "data.path = '~nobody-here/x': no such file or folder; name"),
    ("--data.path=/dev/zero", "data.path = '/dev/zero': neither a file nor a folder; name a file or folder"),
    ("--data.path=" + "x" * 300, "xxx: File name too long; name a shorter one"),
    ("--data.val_path=words.txt",
     "words.txt: all of it is validation text, being in words.txt too; change data.val_path"),
    ("--data.val_path=none", "data.val_path = 'none': no such file or folder; name"),
    ("""'--data.include=["*.md"]' --data.path=done""", "done: no file in it matches data.include = ['*.md']"),
    ("--tokenizer.path=none", "no tokenizer in none: settings.json is missing; name a directory that holds"),
    ("--train.run_dir=done --resume --model.width=64",
     "model.width = 64, but done was begun with 32; restore it, or begin anew in another train.run_dir"),
    ("--train.run_dir=done --resume --train.seed=2", "train.seed = 2, but done was begun with 1; restore it"),
]

TEXTS = [
    ("an empty file", "touch a", "a: the file is empty; remove it or leave it out (in training with data.include)"),
    ("an empty file in a folder", "mkdir a; echo text > a/a; touch a/b", "a/b: the file is empty; remove it"),
    ("an empty folder", "mkdir a", "a: no file in it matches data.include = ['*']"),
    ("hidden files alone", "mkdir a; echo text > a/.a", "a: no file in it matches data.include = ['*']"),
    ("pipes alone", "mkdir a; mkfifo a/a", "a: no file in it matches data.include = ['*']"),
    ("three bytes", "echo hi > a", "a: 3 bytes are too few to hold out 0.1 of them; give more text or data.val_path"),
    ("latin-1 text", r"(cat words.txt; printf 'na\357ve') > a",
     "a: byte ... is not UTF-8; convert the file or leave it out"),
    ("UTF-16 text", r"(printf '\377\376'; cat words.txt) > a", "a: byte 0 is not UTF-8; convert the file or leave"),
    ("nothing but NULs", "head -c 9999 /dev/zero > a", "a: the text has no characters...; use tokenizer.kind=bytes or"),
    ("a pipe", "mkfifo a", "data.path = 'a': neither a file nor a folder; name a file or folder"),
    ("a broken link", "ln -s none a", "data.path = 'a': a broken link; name a file or folder"),
    ("a link to itself", "ln -s a a", "data.path = 'a': a broken link; name a file or folder"),
    ("a broken link in a folder", "mkdir a; echo text > a/a; ln -s none a/b",
     "a/b: No such file or directory; restore it"),
    ("a file that may not be read", "echo text > a; chmod 0 a", "a: Permission denied; change its permissions or name"),
    ("a folder that may not be listed", "mkdir -m 0 a", "a: Permission denied; change its permissions or name"),
    ("a folder within that may not be listed", "mkdir a; echo text > a/a; mkdir -m 0 a/b", "a/b: Permission denied"),
]

TOKENIZERS = [
    ("half a tokenizer", "rm a/*.model", "no tokenizer in a: tokenizer.model is missing; name a directory that holds"),
    ("a tokenizer that is a pipe", "rm a/*.model; mkfifo a/tokenizer.model",
     "no tokenizer in a: tokenizer.model is missing"),
    ("a tokenizer that may not be read", "chmod 0 a/*.model", "a/tokenizer.model: Permission denied; change"),
    ("a tokenizer of no JSON", "echo x > a/settings.json", "a: the tokenizer is damaged (...); restore the directory"),
    ("a tokenizer of a list", "echo [] > a/settings.json", "a: the tokenizer is damaged (...); restore the directory"),
    ("a tokenizer of deep JSON", r"head -c 99999 /dev/zero | tr '\0' '[' > a/settings.json",
     "a: the tokenizer is damaged (...); restore"),
    ("a tokenizer of unknown kind", "sed -i s/bpe/pbe/ a/settings.json",
     "a: the tokenizer is damaged (... 'pbe' is none of: bpe, bytes, sentencepiece, tokenizers); restore"),
    ("a tokenizer of random bytes", "head -c 9999 /dev/urandom > a/tokenizer.model",
     "a: the tokenizer is damaged (...); restore the directory"),
    ("a tokenizer that is a pickle", r"printf '\200\004].' > a/tokenizer.model",
     "a: the tokenizer is damaged (...); restore the directory"),
    ("an empty tokenizer", ": > a/tokenizer.model", "a: the tokenizer is damaged (...); restore the directory"),
    ("a tokenizer of another's settings", """sed -i 's/print": "/&0/' a/settings.json""",
     "a: the tokenizer is not the one that settings.json names; restore both"),
]

RUNS = [
    ("a text that has changed", "sed -i s/king/thing/ words.txt",
     "train tiny.toml --train.run_dir=done --resume --train.max_steps=99",
     "done: the text or the tokenizer at words.txt is not the one this run began with; restore it, or begin anew"),
    ("only damaged checkpoints", "truncate -s 99 done/checkpoints/*/model.safetensors",
     "train tiny.toml --train.run_dir=done --resume --train.max_steps=99",
     "done has only damaged checkpoints; restore one, or begin"),
    ("a run that is not there", "", "sample none", "no run or checkpoint none"),
    ("a pickle for a run", r"printf '\200\004].' > a.pt", "sample a.pt",
     "a.pt holds no valid checkpoint; name a run directory or"),
    ("a file of weights for a run", "", "sample done/checkpoints/step-00000012/model.safetensors",
     "model.safetensors holds no valid checkpoint; name a run directory or"),
    ("a pipe for a run", "mkfifo a", "sample a", "a holds no valid checkpoint; name a run directory or"),
    ("an empty folder for a run", "mkdir a", "sample a", "a holds no valid checkpoint; name a run directory or"),
    ("a checkpoint without a file", "rm done/checkpoints/*12/state.json", "sample done/checkpoints/step-00000012",
     "state.json: missing"),
    ("weights that may not be read", "chmod 0 done/checkpoints/*12/model.safetensors",
     "sample done/checkpoints/step-00000012",
     "model.safetensors: Permission denied; change"),
    ("a masked model", "", "sample masked --prompt a",
     "trained with the objective 'masked', so it cannot continue text; sample from a causal"),
]

COMMAND_LINES = [
    ("sample of nothing", "", "sample", "arguments are required: RUN_OR_CHECKPOINT; sample.py --help"),
    ("train of nothing", "", "train", "arguments are required: config; train.py --help"),
    ("no verb", "", "minigpt", "a verb is missing; there are train, sample"),
    ("an empty verb", "", "minigpt ''", "unknown verb ''; there are train, sample"),
    ("an unknown verb", "", "minigpt dance", "unknown verb 'dance'; there are train, sample"),
    ("a misspelt verb", "", "minigpt sampel done", "unknown verb 'sampel'; did you mean sample?"),
    ("a flag for a verb", "", "minigpt --resume", "unknown verb '--resume'; there are train, sample"),
    ("a verb of nothing", "", "minigpt train", "arguments are required: config; train.py --help"),
    ("verify of nothing", "", "minigpt verify", "arguments are required: PATH; minigpt verify --help"),
    ("verify of what is not there", "", "minigpt verify none", "no run, checkpoint or data set none"),
    ("verify of a text", "", "minigpt verify words.txt",
     "words.txt is no run, checkpoint or data set; name a directory"),
    ("train.py of nothing", "", "train.py", "arguments are required: config; train.py --help"),
    ("train.py of a misspelt key", "", "train.py tiny.toml --train.sed=1", "unknown key train.sed; did you mean seed?"),
    ("sample.py of nothing", "", "sample.py", "arguments are required: RUN_OR_CHECKPOINT; sample.py --help"),
    ("sample.py of bytes that are no Unicode", "", "sample.py done --prompt a\udc80",
     "lone surrogate (U+DC80) at position 1"),
    ("python -m minigpt without a verb", "", "-m minigpt", "a verb is missing; there are train, sample"),
]

FLAGS = [
    ("--prompt", "argument --prompt: expected one argument; sample.py --help"),
    ("--prompt ''", "the prompt is empty; give some text, or none at all to start a new document"),
    ("--prompt '' --stream", "the prompt is empty; give some text"),
    ("--prompt a\udc80", "the text has a lone surrogate (U+DC80) at position 1; ...mend it"),
    ("--temprature=1", "unrecognized arguments: --temprature=1; sample.py --help"),
    ("masked", "unrecognized arguments: masked; sample.py --help"),
    ("--num-samples=0", "--num-samples 0 is not between 1 and 10000"),
    (f"--num-samples={10**30}", "is not between 1 and 10000"),
    ("--stream --json", "--stream prints one sample as text; leave out --json and --num-samples"),
    ("--stream --num-samples=2", "--stream prints one sample as text; leave out --json and --num-samples"),
    ("--max-new-tokens=0", "max_new_tokens = 0 is too small; the least is 1"),
    ("--max-new-tokens=99999999", "max_new_tokens = 99999999 is too large; the most is 10000000"),
    ("--max-new-tokens=ten", "--max-new-tokens: invalid int value: 'ten'; sample.py --help"),
    ("--temperature=-1", "temperature = -1.0 is too small; the least is 0"),
    ("--temperature=nan", "temperature = nan is not a finite number"),
    ("--temperature=1e999", "temperature = inf is not a finite number"),
    ("--temperature=hot", "--temperature: invalid float value: 'hot'; sample.py --help"),
    ("--top-k=1.5", "--top-k: invalid int value: '1.5'; sample.py --help"),
    ("--top-k=-1", "top_k = -1 is too small; the least is 0"),
    (f"--top-k={10**30}", "top_k is a whole number beyond 4611686018427387904; write a smaller one"),
    ("--top-p=1.5", "top_p = 1.5 is too large; the most is 1"),
    ("--repetition-penalty=0", "repetition_penalty = 0.0 is too small; the least is 0.001"),
    ("--repetition-penalty=1e300", "repetition_penalty = 1e+300 is too large; the most is 1000000"),
    ("--seed=-1", "seed = -1 is too small; the least is 0"),
    (f"--seed={10**30}", "seed is a whole number beyond"),
    ("--lookup=-1", "lookup = -1 is no whole number of 0 or more"),
    ("--lookup=4 --invariant", "neither lookup nor a draft goes with invariant"),
    ("--past-context=forget", "argument --past-context: invalid choice: 'forget'"),
    ("--device=gpu", "device 'gpu' cannot be used: ...; take auto, cpu or"),
]

ROWS = [
    *FILES,
    *((f"train {option:.60}", "", f"train tiny.toml {option}", says) for option, says in SETTINGS),
    *((name, prepare, "train tiny.toml --data.path=a", says) for name, prepare, says in TEXTS),
    *((name, f"cp -r done/tokenizer a; {prepare}", "train tiny.toml --tokenizer.path=a", says)
      for name, prepare, says in TOKENIZERS),
    *RUNS,
    *COMMAND_LINES,
    *((f"sample {flag:.60}", "", f"sample done {flag}", says) for flag, says in FLAGS),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """What every row begins with."""
    folder = tmp_path_factory.mktemp("misuse")
    shutil.copy(text_file, folder / "words.txt")
    (folder / "tiny.toml").write_text(toml([*TINY, "--data.path=words.txt", "--train.run_dir=run"]))
    with contextlib.chdir(folder):
        for name, objective in (("done", "causal"), ("masked", "masked")):
            cli.train(["tiny.toml", f"--train.run_dir={name}", f"--objective.name={objective}"])
    return folder


def toml(overrides):
    lines = []
    for section, key, value in (re.fullmatch(r"--(\w+)\.(\w+)=(.*)", text).groups() for text in overrides):
        lines.append(f"{section}.{key} = {value if value.isdigit() else json.dumps(value)}\n")
    return "".join(lines)


@contextlib.contextmanager
def without_privileges():
    """This thread without root's right to pass over permissions, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None)
    header, before = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    after = (ctypes.c_uint32 * 6)(*before)
    after[0] &= ~0b110
    assert libc.capset(header, after) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def state_of(folder):
    """Everything in a folder: {path: what would change with it}."""
    facts = {}
    for path in folder.rglob("*"):
        fact = path.lstat()
        facts[path] = fact.st_mode, (fact.st_ino, fact.st_size, fact.st_mtime_ns) if not path.is_dir() else ()
    return facts


def outcome(program, arguments, capfd):
    """(exit code, standard error)"""
    if program not in COMMANDS:
        words = ["-m", *arguments] if program == "-m" else [str(ROOT / program), *arguments]
        done = subprocess.run([sys.executable, *words], capture_output=True, errors="surrogateescape", timeout=60,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        return done.returncode, done.stderr
    with pytest.raises(SystemExit) as stopped, without_privileges():
        COMMANDS[program](arguments)
    return stopped.value.code, capfd.readouterr().err


@pytest.mark.parametrize("prepare, command, says", [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_misuse_is_one_line_that_names_the_mend_and_changes_nothing(folder, tmp_path, monkeypatch, capfd, prepare,
                                                                    command, says):
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    monkeypatch.chdir(here)
    subprocess.run(["sh", "-ec", prepare], check=True)
    capfd.readouterr()
    before = state_of(here)
    program, *arguments = shlex.split(command)
    code, error = outcome(program, arguments, capfd)
    assert code == 2
    assert re.fullmatch(r"error: .*\n", error), error
    assert re.search(".*".join(map(re.escape, says.split("..."))), error), error
    assert state_of(here) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_output_is_not_finite_is_not_sampled(value, temperature):
    """A model that had diverged ended in torch's own error, or, at temperature 0, in silence."""
    logits = torch.tensor([[0.0, -math.inf, value]])
    with pytest.raises(ValueError, match="not finite.*lower optim.learning_rate"):
        sampling.sample(logits, torch.tensor([[0]]), SamplingParams(temperature=temperature), [torch.Generator()])


def test_every_row_has_a_name_of_its_own():
    names = [row[0] for row in ROWS]
    assert len(set(names)) == len(names) >= 70
