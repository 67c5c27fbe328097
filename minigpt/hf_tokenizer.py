"""Hugging Face's tokenizer files to a Tokenizer and back: tokenizer.json, vocab.json with merges.txt, SentencePiece's
tokenizer.model, BERT's vocab.txt, and tokenizer_config.json, which tells what special tokens are for."""

from __future__ import annotations

import json
from pathlib import Path

from minigpt.encoders import ENCODERS, SPACE
from minigpt.files import read_json
from minigpt.tokenizer import Roles, Tokenizer

FILES = ("tokenizer.json", "vocab.json and merges.txt", "tokenizer.model", "vocab.txt")
"""Of which one is taken, the first that there is."""
MOST_BYTES = 1 << 28


def read(directory: Path, config: dict) -> Tokenizer | None:
    """The tokenizer in a directory, None where there is none; `config` is the model's config.json.

    Raises ValueError naming a file that is damaged or of a kind that cannot be read.
    """
    said = _said(directory)
    readers = {FILES[0]: ("tokenizers", _bytes), "vocab.json": ("tokenizers", _byte_level),
               FILES[2]: ("sentencepiece", _sentencepiece), FILES[3]: ("tokenizers", _word_piece)}
    path = next((directory / name for name in readers if (directory / name).is_file()), None)
    if path is None:
        return None
    kind, make = readers[path.name]
    try:
        model = make(path, said)
        encoder = ENCODERS[kind](model)
        numbers = [config, json_object(directory / "generation_config.json")]
        return Tokenizer(kind, model, _roles(encoder, said, numbers), said)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        message = str(error) if isinstance(error, ValueError | RuntimeError) else f"it has another form ({error!r})"
        named = message.startswith(str(directory))
        raise ValueError(("" if named else f"{path}: ") + message.partition("\n")[0]) from None


def _said(directory):
    """tokenizer_config.json, with what older and newer versions keep in files beside it."""
    path = directory / "tokenizer_config.json"
    said = json_object(directory / "special_tokens_map.json") | json_object(path)
    for key, value in said.items():
        if key.endswith("_token") and not isinstance(value, bool) and not isinstance(_content(value), str | None):
            raise ValueError(f"{path}: {key} = {value!r} is no token's text")
    template = directory / "chat_template.jinja"
    if template.is_file():
        said["chat_template"] = _text(template)
    return said


def _text(path):
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text") from None


def json_object(path: Path) -> dict:
    """What a JSON file holds, nothing where there is none. Raises ValueError where it is no object."""
    content = read_json(path, MOST_BYTES) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _bytes(path, said):
    if path.stat().st_size > MOST_BYTES:
        raise ValueError("too large for a tokenizer")
    return path.read_bytes()


def _sentencepiece(path, said):
    model = _bytes(path, said)
    encoder = ENCODERS["sentencepiece"](model)
    for name in _added(path, said):
        if encoder.id_of(name) is None:
            raise ValueError(f"{name!r} is added to it by another file; save the tokenizer as tokenizer.json")
    return model


def _added(path, said):
    """{name: (id, whether it is special)} of the tokens that files beside a vocabulary add to it."""
    special = {_content(value) for key, value in said.items() if key.endswith("_token")}
    special |= set(map(_content, said.get("additional_special_tokens") or ()))
    added = {name: (id, name in special) for name, id in json_object(path.with_name("added_tokens.json")).items()}
    for id, token in (said.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = int(id), token.get("special", False)
    return added


def _byte_level(path, said):
    """The tokenizer.json of GPT-2's vocab.json and merges.txt."""
    kind = (said.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind != "GPT2Tokenizer":
        raise ValueError(f"how a {kind} splits a text is not known; save the tokenizer as tokenizer.json")
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise ValueError(f"{merges.name} is missing beside it")
    vocabulary = json_object(path)
    pairs = [line.split(" ") for line in _text(merges).split("\n") if line and not line.startswith("#version")]
    bad = [pair for pair in pairs if len(pair) != 2 or not vocabulary.keys() >= {*pair, "".join(pair)}]
    if bad:
        raise ValueError(f"{' '.join(bad[0])!r} in {merges.name} is no merge of two of its tokens to a third")
    byte_level = {"type": "ByteLevel", "add_prefix_space": bool(said.get("add_prefix_space", False)),
                  "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "byte_fallback": False, "fuse_unk": False, "merges": pairs}
    said.setdefault("eos_token", "<|endoftext|>")
    names = {_content(value) for key, value in said.items() if key.endswith("_token")}
    return _tokenizer_json(model, {name: vocabulary[name] for name in names if name in vocabulary}, _added(path, said),
                           pre_tokenizer=byte_level, decoder=byte_level)


def _word_piece(path, said):
    """The tokenizer.json of BERT's vocab.txt."""
    vocabulary = {token: id for id, token in enumerate(_text(path).rstrip("\n").split("\n"))}
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise ValueError(f"the token {missing[0]} is missing")
    special = {name: vocabulary[name] for name in names}
    for role, name in dict(bos="[CLS]", eos="[SEP]", pad="[PAD]", mask="[MASK]").items():
        said.setdefault(f"{role}_token", name)
    return _tokenizer_json(
        {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100, "vocab": vocabulary}, special, _added(path, said),
        normalizer={"type": "BertNormalizer", "clean_text": True, "strip_accents": said.get("strip_accents"),
                    "handle_chinese_chars": said.get("tokenize_chinese_chars", True),
                    "lowercase": said.get("do_lower_case", True)},
        pre_tokenizer={"type": "BertPreTokenizer"}, post_processor=_template(special, ["[CLS]"], ["[SEP]"]),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})


def _content(token):
    """The name of a token that tokenizer_config.json gives as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _roles(encoder, said, numbers):
    """What special tokens are for, by the names of tokenizer_config.json and the ids of the model's files."""
    def named(*roles):
        names = [_content(said.get(f"{role}_token")) for role in roles]
        return [encoder.id_of(name) for name in names if name is not None]

    def numbered(role):
        given = [config.get(f"{role}_token_id") for config in numbers]
        ids = [id for value in given for id in (value if isinstance(value, list) else [value])]
        return [id for id in ids if id in encoder.special_tokens.values()]

    def known(ids):
        return list(dict.fromkeys(id for id in ids if id is not None))

    starts = known([*named("bos"), *numbered("bos"), *named("cls"), *encoder.usual("bos")])
    ends = known([*named("eos"), *numbered("eos")]) or known([*named("sep"), *encoder.usual("eos")])
    if not starts and not ends:
        raise ValueError("no token is named that begins or ends a text; add bos_token or eos_token to "
                         "tokenizer_config.json")
    start = (starts or ends)[0]
    before = encoder.before() if encoder.file == FILES[0] else [start] if said.get("add_bos_token", True) else []
    padding = known([*named("pad"), *numbered("pad"), *encoder.usual("pad"), *ends, start])[0]
    return Roles(start, tuple(ends) or (start,), padding, *known(named("mask"))[:1] or [None], tuple(before))


def ids_of(tokenizer: Tokenizer | None) -> dict:
    """What config.json and generation_config.json say of special tokens; without a tokenizer, that there are none."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    roles = tokenizer.roles
    ends = list(roles.end_tokens)
    return {"bos_token_id": roles.document_start, "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": _own_padding(roles)}


def _own_padding(roles):
    """The padding token, None where another has to do for it: transformers learns nothing of its padding token."""
    return None if roles.padding in (*roles.end_tokens, roles.document_start) else roles.padding


def write(directory: Path, tokenizer: Tokenizer, context_length: int, pairs: bool = False) -> None:
    """Write tokenizer.json, tokenizer_config.json and, of SentencePiece, tokenizer.model, which transformers loads.

    With `pairs`, for a model of one text or two, a tokenizer of ours makes rows as `objectives.text_rows` does.
    """
    theirs = tokenizer.kind == "tokenizers"
    model = tokenizer.model if theirs else _sentencepiece_json(tokenizer, pairs)
    (directory / "tokenizer.json").write_bytes(model)
    if tokenizer.encoder.file == "tokenizer.model":
        (directory / "tokenizer.model").write_bytes(tokenizer.model)
    names, roles = {id: name for name, id in tokenizer.special_tokens.items()}, tokenizer.roles
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length,
              "clean_up_tokenization_spaces": False}
    if not theirs:
        config["add_prefix_space"] = tokenizer.encoder.puts_space
    for role, id in (("bos", roles.document_start), ("eos", roles.end_tokens[0]), ("pad", _own_padding(roles)),
                     ("mask", roles.mask), ("unk", tokenizer.special_tokens.get("<unk>"))):
        if id in names:
            config[f"{role}_token"] = names[id]
    if pairs and not theirs:
        config |= {"sep_token": names[roles.separator],
                   "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    kept = tokenizer.theirs if theirs else {key: tokenizer.theirs[key] for key in ("chat_template",)
                                            if key in tokenizer.theirs}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | kept, indent=2, ensure_ascii=False) + "\n",
                                                     "utf-8")


def _sentencepiece_json(tokenizer, pairs):
    """The tokenizer.json of a SentencePiece BPE or of bytes: merges in the order of the pieces' scores.

    Its ids are the same, but for texts that hold SPACE itself, which it takes for a space.
    """
    pieces = tokenizer.encoder.pieces()
    vocabulary = {piece: id for id, (piece, _) in enumerate(pieces)}
    text = {piece for piece, score in pieces if score is not None}
    merges = []
    for piece, _ in sorted(((piece, score) for piece, score in pieces if score is not None), key=lambda it: -it[1]):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted((pair for pair in halves if text.issuperset(pair)),
                         key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    def replace(old, new):
        return [{"type": "Replace", "pattern": {"String": old}, "content": new}] * (SPACE in text)

    prefix = [{"type": "Prepend", "prepend": SPACE}] * tokenizer.encoder.puts_space
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * tokenizer.encoder.puts_space
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    return _tokenizer_json(
        {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": "<0x00>" in vocabulary,
         "vocab": vocabulary, "merges": merges}, tokenizer.special_tokens, {},
        normalizer={"type": "Sequence", "normalizers": prefix + replace(" ", SPACE)},
        post_processor=_template(tokenizer.special_tokens, [names[id] for id in tokenizer.roles.prompt_start],
                                 [names[tokenizer.roles.separator]] * pairs),
        decoder={"type": "Sequence", "decoders": replace(SPACE, " ") + [{"type": "ByteFallback"}, {"type": "Fuse"}]
                 + strip})


def _template(ids, before, behind):
    """What puts special tokens, by name, before and behind a text, or each of two."""
    def around(sequence, type_id):
        ends = [[{"SpecialToken": {"id": name, "type_id": type_id}} for name in names] for names in (before, behind)]
        return [*ends[0], {"Sequence": {"id": sequence, "type_id": type_id}}, *ends[1]]

    pair = around("A", 0) + around("B", 1)[len(before):]
    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*before, *behind)}
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": tokens}


def _tokenizer_json(model, special, more, **parts):
    """A tokenizer.json of a model with special tokens {name: id} and `more` tokens {name: (id, whether special)}."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    tokens = {name: (id, True) for name, id in special.items()} | more
    added = [{"id": id, "content": name, **flags, "special": is_special}
             for name, (id, is_special) in sorted(tokens.items(), key=lambda item: item[1])]
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
               "pre_tokenizer": None, "post_processor": None, "decoder": None, **parts, "model": model}
    return json.dumps(content, ensure_ascii=False).encode()
