"""Configs: what is written is what is read, presets and precedence, every fault named with its file, line and key."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from minigpt.config import (
    PRESETS,
    SECTIONS,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    SamplingParams,
    TrainConfig,
    field_docs,
    help_text,
    load_config,
    make_config,
)

EVERY_SECTION = [*SECTIONS.values(), SamplingParams]
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.fixture
def load(tmp_path):
    """load(text, *overrides) reads the text as a config file."""
    def load(text="", *overrides, name="run.toml"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return load_config(path, overrides)
    return load


def fault(function, *arguments, **options):
    """The message of the ValueError that the call raises, which is one line."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_file_gives_the_defaults(load):
    assert load() == Config() == load("{}", name="run.json") == make_config({})


def test_toml_sets_what_it_says_and_nothing_else(load):
    config = load('[data]\npath = "a b"\ninclude = ["*.py", "*.md"]\n[optim]\nlearning_rate = 1\n'
                  '[train]\ncompile = true\nmax_steps = 7\n[model]\nqkv_bias = false\n')
    expected = Config(data=DataConfig(path="a b", include=["*.py", "*.md"]), optim=OptimConfig(learning_rate=1.0),
                      train=TrainConfig(compile=True, max_steps=7), model=ModelConfig(qkv_bias=False))
    assert config == expected
    assert type(config.optim.learning_rate) is float


def test_a_byte_order_mark_is_no_part_of_the_file(load):
    assert load("\ufeff[train]\nmax_steps = 7\n").train.max_steps == 7


@pytest.mark.parametrize("overrides", [[], ["--model.preset=gpt2"], ["--model.qkv_bias=true", "--train.seed=987654321"],
                                       ['--data.include=["*.é", "\\"q\\""]', "--data.path=a\nb", "--optim.eps=3e-11"]])
def test_json_round_trip(load, overrides):
    config = load("[train]\nsample_prompts = ['x', 'žů\\n']\n", *overrides)
    assert load(config.to_json(), name="config.json") == config
    assert make_config(json.loads(config.to_json())) == config


@pytest.mark.parametrize("override, section, key, value", [
    ("--train.max_steps=500", "train", "max_steps", 500),
    ("--optim.learning_rate=3e-4", "optim", "learning_rate", 3e-4),
    ("--optim.learning_rate=2", "optim", "learning_rate", 2.0),
    ("--train.compile=true", "train", "compile", True),
    ("--model.qkv_bias=false", "model", "qkv_bias", False),
    ("--model.qkv_bias=null", "model", "qkv_bias", None),
    ("--data.path=runs/a=b", "data", "path", "runs/a=b"),
    ("--data.path=12", "data", "path", "12"),
    ("--data.path=true", "data", "path", "true"),
    ("--tokenizer.path=", "tokenizer", "path", ""),
    ("--train.sample_prompts=[]", "train", "sample_prompts", []),
    ('--data.include=["*.py", "a,b"]', "data", "include", ["*.py", "a,b"]),
])
def test_overrides_of_every_type(load, override, section, key, value):
    got = getattr(getattr(load("", override), section), key)
    assert got == value and type(got) is type(value)


def test_the_command_line_goes_over_the_file_and_the_last_word_wins(load):
    config = load("[train]\nmax_steps = 1\nseed = 5\n", "--train.max_steps=2", "--train.max_steps=3")
    assert (config.train.max_steps, config.train.seed) == (3, 5)


def test_an_override_mends_what_the_file_has_wrong(load):
    assert load("[train]\nmax_steps = 0\n", "--train.max_steps=2").train.max_steps == 2


def test_an_override_holds_one_setting():
    """A line break in an override was read as a second TOML key, and that key was dropped in silence."""
    assert "max_steps takes a whole number" in fault(load_config, CONFIGS[0], ["--train.max_steps=10\nseed=3"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets(load, name):
    model = load(f'[model]\npreset = "{name}"\n').model
    assert model == ModelConfig(**PRESETS[name]) == load("", f"--model.preset={name}").model


def test_keys_of_the_same_place_go_over_the_preset(load):
    assert load('[model]\nwidth = 64\npreset = "tiny"\n').model == ModelConfig(**PRESETS["tiny"] | {"width": 64})
    model = load('[model]\npreset = "tiny"\n', "--model.width=64").model
    assert model == ModelConfig(**PRESETS["tiny"] | {"width": 64})


def test_a_preset_on_the_command_line_is_that_model(load):
    """The file's [model] keys hid the preset's, so that --model.preset=base over a small recipe stayed small."""
    text = "[model]\nwidth = 192\ndepth = 3\nhead_size = 10\n"
    assert load(text, "--model.preset=base").model == ModelConfig(**PRESETS["base"])
    model = load(text, "--model.depth=5", "--model.preset=base").model
    assert model == ModelConfig(**PRESETS["base"] | {"depth": 5})


@pytest.mark.parametrize("text, where, says", [
    ("[train]\n\nmax_step = 5\n", ":3: ", "unknown key train.max_step; did you mean max_steps?"),
    ("[model]\nlearning_rate = 5\n", ":2: ", "unknown key model.learning_rate; "),
    ("[data]\n[trian]\nseed = 5\n", ":3: ", "unknown section [trian]; did you mean train?"),
    ("[zzzzz]\n", ": ", "unknown section [zzzzz]; known are data, tokenizer, model, objective, optim, train"),
    ("[model]\npreset = 'gpt3'\n", ":2: ", "unknown preset 'gpt3'; there are tiny, small, base, gpt2"),
    ("[model]\npreset = ['gpt2']\n", ":2: ", "unknown preset ['gpt2']"),
    ("[train]\nmax_steps = '5'\n", ":2: ", "train.max_steps takes a whole number, not '5'"),
    ("[train]\nmax_steps = 5.0\n", ":2: ", "train.max_steps takes a whole number, not 5.0"),
    ("[train]\nmax_steps = true\n", ":2: ", "train.max_steps takes a whole number, not True"),
    ("train.max_steps = 0\n", ":1: ", "train.max_steps = 0 is too small; the least is 1"),
    ("[optim]\nlearning_rate = false\n", ":2: ", "optim.learning_rate takes a number, not False"),
    ("[optim]\nlearning_rate = 1" + "0" * 400 + "\n", ":2: ", "optim.learning_rate is a whole number beyond 46116"),
    ("[optim]\nbeta1 = -1\n", ":2: ", "optim.beta1 = -1.0 is too small; the least is 0.0"),
    ("[data]\n'val_fraction' = 0.95\n", ":2: ", "data.val_fraction = 0.95 is too large; the most is 0.9"),
    ("[train]\n dtype = 'float8'\n", ":2: ", "train.dtype = 'float8' is none of: auto, float32, bfloat16, float16"),
    ("[train]\ncompile = 1\n", ":2: ", "train.compile takes true or false, not 1"),
    ("[data]\npath = 3\n", ":2: ", "data.path takes a string, not 3"),
    ("[data]\ninclude = '*.py'\n", ":2: ", "data.include takes a list of strings, not '*.py'"),
    ("[data]\ninclude = ['a', 3]\n", ":2: ", "data.include takes a list of strings, not ['a', 3]"),
    ("[data]\npath = ''\n", ":2: ", "[data] path is empty"),
    ("[model]\nqkv_bias = 'no'\n", ":2: ", "model.qkv_bias takes true or false, not 'no'"),
    ("[model]\nwidth.x = 5\n", ":2: ", "model.width takes a whole number, not {'x': 5}"),
    ("max_steps = 3\n", ": ", "max_steps stands outside a section; sections are [data], [tokenizer]"),
    ("[[train]]\nmax_steps = 3\n", ": ", "train stands outside a section"),
    ("[train\nmax_steps = 3\n", ": ", "line 1"),
    ("[train]\nmax_steps = = 3\n", ": ", "line 2"),
    ("[train]\nmax_steps = 1\nmax_steps = 2\n", ": ", "overwrite"),
])
def test_faults_of_a_file_name_it_with_line_and_key(load, tmp_path, text, where, says):
    message = fault(load, text)
    assert message.startswith(f"{tmp_path / 'run.toml'}{where}") and says in message


def test_a_fault_of_a_runs_json_names_the_line(load, tmp_path):
    tree = json.loads(Config().to_json())
    tree["optim"]["beta1"] = 7.0
    text = json.dumps(tree, indent=2)
    line = 1 + text[:text.index('"beta1"')].count("\n")
    assert fault(load, text, name="config.json").startswith(f"{tmp_path / 'config.json'}:{line}: optim.beta1 = 7.0 is")


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"model": null}', '{"model": {"bias": null}}'])
def test_faults_of_json(load, tmp_path, text):
    assert fault(load, text, name="run.json").startswith(f"{tmp_path / 'run.json'}: ")


@pytest.mark.parametrize("override, says", [
    ("--train.max_steps", "write it as --train.max_steps=VALUE"),
    ("500", "'500' is not understood; settings are written --section.key=value"),
    ("--max_steps=5", "settings are written --section.key=value"),
    ("train.max_steps=5", "settings are written --section.key=value"),
    ("--train.max_steps=", "train.max_steps takes a whole number, not ''"),
    ("--train.max_steps=many", "train.max_steps takes a whole number, not 'many'"),
    ("--train.max_steps=null", "train.max_steps takes a whole number, not None"),
    ("--train.compile=True", "train.compile takes true or false, not 'True'"),
    ("--train.max_step=5", "unknown key train.max_step; did you mean max_steps?"),
    ("--trian.max_steps=5", "unknown section [trian]; did you mean train?"),
    ("--optim.name=sgd", "optim.name = 'sgd' is none of: muon, adamw"),
    ("--model.preset=tniy", "unknown preset 'tniy'"),
])
def test_faults_of_the_command_line(load, override, says):
    message = fault(load, "[train]\nseed = 3\n", override)
    assert message.startswith("command line: ") and says in message


def test_a_value_after_a_space_is_told_from_a_setting(load):
    assert "write it as --train.max_steps=VALUE" in fault(load, "", "--train.max_steps", "500")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_no_setting_is_infinite_or_not_a_number(load, value):
    """inf was taken for every number without an upper limit, and then written to config.json as no JSON."""
    for section, factory in SECTIONS.items():
        for field in dataclasses.fields(factory):
            if field.type == "float":
                message = fault(load, "", f"--{section}.{field.name}={value}")
                assert f"{section}.{field.name}" in message and "is not a finite number" in message
    for text in (f'{{"optim": {{"learning_rate": {number}}}}}' for number in ("NaN", "Infinity", "-Infinity", "1e999")):
        assert "is not a finite number" in fault(load, text, name="run.json")


@pytest.mark.parametrize("columns", [
    dict(text_columns=[]), dict(text_columns=["a", "b", "c"]), dict(text_columns=["a", "a"]), dict(label_column=""),
    dict(text_columns=[""]), dict(text_columns=["label"])])
def test_columns_of_a_table(columns):
    assert "must be one column or two of text, and another of labels" in fault(DataConfig, **columns)
    assert "of pairs in text_columns take truncate" in fault(DataConfig, text_columns=["a", "b"], long_texts="window")


@pytest.mark.parametrize("name", [
    "", "mask", "causal@3", "causal,masked", "causal,masked@0", "causal,masked@5,causal@5", "causal+causal", "causal:",
    "causal:-1", "causal:nan", "causal:inf", "masked+", "causal,masked@" + "9" * 30])
def test_objectives_that_say_nothing(name):
    assert f"name = {name!r}: " in fault(ObjectiveConfig, name=name)


@pytest.mark.parametrize("keys, says", [
    (dict(width=100, num_heads=3), "width = 100 is not a multiple of num_heads = 3"),
    (dict(width=96, num_heads=6, num_kv_heads=4), "num_heads = 6 is not a multiple of num_kv_heads = 4"),
    (dict(num_heads=4, num_kv_heads=8), "num_heads = 4 is not a multiple of num_kv_heads = 8"),
    (dict(width=20, num_heads=4), "width / num_heads = 5 is odd"),
    (dict(head_size=7), "head_size = 7 is odd"),
])
def test_contradictions(load, tmp_path, keys, says):
    assert says in fault(ModelConfig, **keys)
    text = "[model]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
    message = fault(load, text)
    assert says in message
    lines = [line for line, key in enumerate(keys, 2) if key in says.split()]
    assert message.startswith("".join(f"{tmp_path / 'run.toml'}:{line}: " for line in lines) + "[model] ")


def test_a_contradiction_of_two_places_names_both(load, tmp_path):
    """Of a file and the command line only one was named, by the order of the alphabet."""
    message = fault(load, "[model]\nwidth = 100\n", "--model.num_heads=3")
    assert message.startswith(f"{tmp_path / 'run.toml'}:2: command line: [model] width = 100")


@pytest.mark.parametrize("keys", [dict(width=100, num_heads=3, head_size=32), dict(width=20, position="learned"),
                                  dict(num_heads=6, num_kv_heads=3, width=96), dict(num_kv_heads=1)])
def test_what_only_looks_like_a_contradiction(keys):
    model = ModelConfig(**keys)
    assert model.D == keys.get("head_size", model.width // model.num_heads)
    assert model.H_kv == keys.get("num_kv_heads", model.num_heads)


WITH = {"num_beam_groups": dict(num_beams=1024, diversity_penalty=1.0), "penalty_alpha": dict(top_k=2),
        "min_new_tokens": dict(max_new_tokens=10_000_000), "diversity_penalty": dict(num_beams=2, num_beam_groups=2)}
"""What goes with the largest value of some fields."""


def test_ranges_are_inclusive_and_checked_for_every_field():
    for factory in EVERY_SECTION:
        for field in dataclasses.fields(factory):
            low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
            beyond = 1 if field.type in ("int", "list[int]") else 1e-9

            def given(value, field=field):
                return {field.name: {5: value} if field.type.startswith("dict") else
                        [value] if field.type == "list[int]" else value}

            if low is not None:
                if field.name not in ("width", "rope_high_turns"):      # whose least contradicts another's default
                    factory(**given(low))
                assert "is too small" in fault(factory, **given(low - beyond))
            if high is not None:
                factory(**given(high), **WITH.get(field.name, {}))
                assert "is too large" in fault(factory, **given(high + beyond))
            for choice in choices or ():
                factory(**{field.name: choice})


def test_every_field_of_every_section_is_documented():
    for factory in EVERY_SECTION:
        docs = field_docs(factory)
        assert list(docs) == [field.name for field in dataclasses.fields(factory)]
        assert all(text.endswith(".") and len(text) > 10 for text in docs.values())


def test_help_shows_every_default_as_a_shell_takes_it(load):
    """Lists and strings stood there in JSON, which a shell strips of its quotes."""
    words = [shlex.split(line) for line in help_text().splitlines() if line.startswith("  --")]
    overrides = [word for [word] in words if word != "--model.preset=NAME"]
    assert len(overrides) == sum(len(dataclasses.fields(factory)) for factory in SECTIONS.values())
    other = '[train]\nsample_prompts = ["x"]\nseed = 9\n[data]\ninclude = ["*.py"]\n[model]\nqkv_bias = true\n'
    assert load(other, *overrides) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads(load, path):
    config = load_config(path)
    assert config != Config()
    assert load(config.to_json(), name="config.json") == config


def test_there_are_recipes():
    assert {"quickstart", "shakespeare_cpu"} <= {path.stem for path in CONFIGS}


def test_missing_and_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no config file {tmp_path / 'none.toml'}")):
        load_config(tmp_path / "none.toml")
    with pytest.raises(FileNotFoundError, match="no config file"):
        load_config(tmp_path)
    monkeypatch.chdir(CONFIGS[0].parent.parent)
    with pytest.raises(FileNotFoundError, match="did you mean configs/quickstart.toml"):
        load_config("configs/quikstart.toml")
    (tmp_path / "latin1.toml").write_bytes(b"[data]\npath = '\xe9'\n")
    assert str(tmp_path / "latin1.toml") in fault(load_config, tmp_path / "latin1.toml")
