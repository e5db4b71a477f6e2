"""What the files of a tokenizer say, as what a tokenizer.json and a tokenizer_config.json would say.

Source: the documentation of the transformers library, huggingface.co/docs/transformers, for what stands in
tokenizer_config.json; github.com/ggml-org/ggml/blob/master/docs/gguf.md for the same in a .gguf file.
"""

from data.bpe import SPACE
from data.files import InputError, one_of, read_json
from data.gguf import read_gguf
from data.splits import flat_steps

STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
WORDS = (  # how Llama 3 and Qwen 2 split a text, but for the length of numbers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern):
    """The pre-tokenizer whose pieces are the matches of `pattern`."""
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [step, STEP | {"use_regex": False}]


SPLITS = {  # by GGUF's names: the pre-tokenizer
    "gpt-2": [STEP], "smollm": [{"type": "Digits", "individual_digits": True}, STEP],
    "llama-bpe": _split(WORDS.replace("NUMBER", "{1,3}")), "qwen2": _split(WORDS.replace("NUMBER", "")),
}  # fmt: skip
BEGUN = ("llama", "llama-bpe")  # of a .gguf file's models and splits, those with a token in front of a text
NFC = ("qwen2",)  # of these, those that normalise
CONTROL, USER_DEFINED, NEVER_MERGED = (2, 3), 4, (2, 3, 6)  # a .gguf file's kinds of tokens; 6: a byte
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SPACES_BACK = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
               {"type": "Fuse"}]  # fmt: skip


def describe(path):
    """(what a tokenizer.json says, what a tokenizer_config.json says) of `path`, or would say."""
    if path.suffix == ".gguf":
        described, config = _describe_gguf(path, read_gguf(path)[0])
    else:
        described = _describe_folder(path)
        config = _config_of_folder(path, described)
    one_of(path, "add_bos_token", config.get("add_bos_token"), (None, True, False))
    if "post_processor" not in described:  # these files have no place for one
        described["post_processor"] = in_front(described, begins_with(described, config))
    return described, config


def begins_with(described, config):
    """The name of the token that the checkpoint puts in front of every text, None if it puts none."""
    if config.get("add_bos_token") is False:
        return None
    if config.get("add_bos_token") and config.get("bos_token"):
        return config["bos_token"]
    for step in flat_steps(described.get("post_processor"), "processors"):
        if "cls" in step:  # of BERT and RoBERTa
            return step["cls"][0]
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


def in_front(described, name):
    """The post-processor that puts the token `name` in front of a text; None for no name."""
    if name is None:
        return None
    ids = {token["content"]: token["id"] for token in described["added_tokens"]}
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    text, another = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    return {
        "type": "TemplateProcessing", "single": [first, text], "pair": [first, text, another],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]}},
    }  # fmt: skip


def _config_of_folder(path, described):
    """What a folder's tokenizer_config.json says, and of what it leaves out its config.json."""
    config = {}
    if (path / "config.json").exists():
        config = _roles(described, read_json(path / "config.json"))
    if (path / "tokenizer_config.json").exists():
        config |= read_json(path / "tokenizer_config.json")
    for role in {"eos_token", "bos_token", "pad_token"} & config.keys():
        said = config[role]
        config[role] = said["content"] if isinstance(said, dict) else said  # with an added token's options
        one_of(path, f"the kind of the {role}", type(config[role]), (str, type(None)))
    return config


def _describe_folder(path):
    if (path / "tokenizer.json").exists():
        return read_json(path / "tokenizer.json")
    if not (path / "vocab.json").exists():
        raise InputError(f"{path} has no tokenizer.json or vocab.json (a SentencePiece file is not read)")
    # Without a word on how to split: known for two families.
    family = read_json(path / "config.json")["model_type"]
    one_of(path, "model_type without tokenizer.json", family, ("gpt2", "opt"))
    vocab = read_json(path / "vocab.json")
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    named = vocab.keys() - {merge.replace(" ", "") for merge in merges}
    added = [_added(vocab, token) for token in vocab if token in named and len(token) > 1]
    return _bytes(vocab, merges, added, SPLITS["gpt-2"])


def _roles(described, fields, padding="pad_token_id"):
    """{role: name} of the tokens whose ids stand in `fields`: one, or the first of a list."""
    names, roles = {token["id"]: token["content"] for token in described["added_tokens"]}, {}
    for role, field in (("eos", "eos_token_id"), ("bos", "bos_token_id"), ("pad", padding)):
        number = fields.get(field)
        number = number[0] if isinstance(number, list) else number
        if number in names:
            roles[f"{role}_token"] = names[number]
    return roles


def _added(vocab, token, special=True):
    return {"id": vocab[token], "content": token, **ADDED, "special": special}


def _bytes(vocab, merges, added, split, normalizer=None, **options):
    """The tokenizer.json of a byte-level BPE."""
    return {
        "version": "1.0", "normalizer": normalizer, "added_tokens": added, "decoder": STEP,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, **options},
    }  # fmt: skip


def _describe_gguf(path, metadata):
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    kinds, tokens = fields["token_type"], fields["tokens"]
    model = one_of(path, "tokenizer.ggml.model", fields["model"], ("gpt2", "llama"))
    if model == "llama":  # the user's own tokens are stored with spaces
        stored = zip(tokens, kinds)
        tokens = [name.replace(" ", SPACE) if kind == USER_DEFINED else name for name, kind in stored]
    vocab = {token: number for number, token in enumerate(tokens)}
    added = [_added(vocab, token, kind in CONTROL) for token, kind in zip(tokens, kinds)
             if kind in (*CONTROL, USER_DEFINED)]  # fmt: skip
    if model == "llama":
        merges = _merges_by_score(tokens, fields["scores"], kinds)
        unknown = tokens[kinds.index(2)] if 2 in kinds else None
        described = _characters(vocab, merges, added, unknown, fields.get("add_space_prefix", True))
    else:
        name = one_of(path, "tokenizer.ggml.pre", fields["pre"], SPLITS)
        normalizer = {"type": "NFC"} if name in NFC else None
        ignoring = {"ignore_merges": True} if name == "llama-bpe" else {}
        described = _bytes(vocab, fields["merges"], added, SPLITS[name], normalizer, **ignoring)
    config = _roles(described, fields, "padding_token_id")
    is_begun = model in BEGUN or fields.get("pre") in BEGUN
    config["add_bos_token"] = fields.get("add_bos_token", is_begun) and "bos_token" in config
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return described, config


def _characters(vocab, merges, added, unknown, prefix):
    """The tokenizer.json of a SentencePiece-style BPE; `prefix`: a text gets a space in front."""
    first = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0", "normalizer": {"type": "Sequence", "normalizers": [*first, TO_SPACE]},
        "added_tokens": added, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*SPACES_BACK, *strip]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True,
                  "unk_token": unknown},
    }  # fmt: skip


def _merges_by_score(tokens, scores, kinds):
    """Every pair of tokens that makes a token: those of the highest score first, then those of longer halves.

    Tokens of the user's come before the others, whatever their score: SentencePiece never splits them.
    """
    rated = zip(tokens, scores, kinds)
    rank = {token: (kind != USER_DEFINED, -score) for token, score, kind in rated if kind not in NEVER_MERGED}
    merges = []
    for token in rank:
        halves = [(token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1)]
        merges += [[left, right] for left, right in halves if left in rank and right in rank]
    return sorted(merges, key=lambda pair: (*rank[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))
