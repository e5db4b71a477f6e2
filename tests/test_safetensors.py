"""Safetensors files, whole and damaged."""

import json
import random
import struct

import pytest
import torch
from hub import MODELS, safetensors, weights_of

import data
from data.files import InputError
from data.safetensors import open_safetensors, safetensors_bytes


def with_header(header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "empty": b"",
    "short": b"\x01\0\0",
    "no header": struct.pack("<Q", 0),
    "header past the end": struct.pack("<Q", 100) + b"{}",
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "largest header": b"\xff" * 8 + b"{}",
    "not JSON": with_header(b"{..}"),
    "not an object": with_header([1]),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "deep": with_header(b"[" * 100000),
    "no entry": with_header({"a": 3}),
    "no offsets": with_header({"a": {"dtype": "F32", "shape": [2, 2]}}),
    "three offsets": with_header({"a": entry(offsets=(0, 8, 16))}),
    "past the end": with_header({"a": entry(shape=(2, 4), offsets=(0, 32))}),
    "truncated": with_header({"a": entry()}, b"\0" * 15),
    "bytes left": with_header({"a": entry()}, b"\0" * 17),
    "gap": with_header({"a": entry(shape=(2,), offsets=(8, 16))}),
    "overlap": with_header({"a": entry(), "b": entry(shape=(2,), offsets=(8, 16))}),
    "negative": with_header({"a": entry(offsets=(-16, 0))}),
    "backwards": with_header({"a": entry(offsets=(16, 0))}),
    "dtype": with_header({"a": entry(dtype="F4")}),
    "dtype list": with_header({"a": entry(dtype=["F32"])}),
    "other size": with_header({"a": entry(dtype="F16")}),
    "bool offset": with_header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, b"\0"),
    "bool shape": with_header({"a": entry(shape=(True, 4))}),
    "float shape": with_header({"a": entry(shape=(2.0, 2))}),
    "negative shape": with_header({"a": entry(shape=(-2, -2))}),
    "text shape": with_header({"a": {"dtype": "F32", "shape": "22", "data_offsets": [0, 16]}}),
    "many dimensions": with_header({"a": entry(shape=[1] * 100000)}),
    "huge shape": with_header({"a": entry(shape=(2**62, 2**62))}),
    "empty and huge": with_header({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, b""),
    "surrogate": with_header(b'{"\\ud800": 1}'),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_damaged_safetensors(damage, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["gpt2"]["config"]))
    (tmp_path / "model.safetensors").write_bytes(BROKEN[damage])
    with pytest.raises(InputError, match="model.safetensors") as error:
        data.load_model(tmp_path)
    assert len(str(error.value).encode()) < 1000  # it can be printed


@pytest.mark.slow
def test_fuzzed_safetensors(tmp_path):
    """Changed bytes are an InputError or a model; never another exception."""
    whole = safetensors(dict(list(weights_of("gpt2").items())[:3]))
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    chance, refused = random.Random(0), 0
    path = tmp_path / "model.safetensors"
    for _ in range(1500):
        content = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.2 else whole)
        for _ in range(chance.randint(1, 3)):
            if content:
                content[chance.randrange(min(header, len(content)))] = chance.choice(
                    b'0123456789-,:"[]{}eE\\ \xff\0'
                )
        path.write_bytes(content)
        try:
            for load in open_safetensors(path).values():
                load().float().sum()
        except InputError:
            refused += 1
    assert 0 < refused < 1500  # both happen


@pytest.mark.parametrize("dtype, largest", ((torch.float16, 65504.0), (torch.bfloat16, 3e38)))
def test_a_value_that_the_file_cannot_hold_is_an_error(dtype, largest):
    tensors = {"fits": torch.tensor([largest, torch.inf, torch.nan]), "large": torch.tensor([1.0, -3.4e38])}
    safetensors_bytes({"fits": tensors["fits"]}, dtype)
    with pytest.raises(InputError, match=f"tensor 'large' has values beyond {dtype}"):
        safetensors_bytes(tensors, dtype)


def test_unaligned_data(tmp_path):
    tensor = torch.arange(4.0)
    text = json.dumps({"a": entry(shape=(4,))}).encode()
    text += b" " * (3 - len(text) % 8)
    (tmp_path / "a.safetensors").write_bytes(with_header(text, tensor.numpy().tobytes()))
    assert torch.equal(open_safetensors(tmp_path / "a.safetensors")["a"](), tensor)
