"""Checkpoint folders: what else stands in them, what is missing, and what is written."""

import json

import pytest
import torch
from hub import MODELS, logits_of, weights_of, write

import data
from data.files import InputError, find


def test_names_without_the_prefix(tmp_path):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in weights_of("gpt2").items()}
    logits = logits_of(data.load_model(write(tmp_path, MODELS["gpt2"]["config"], tensors)))
    torch.testing.assert_close(
        logits[:, [0, 5, 11]], torch.tensor(MODELS["gpt2"]["logits"]), rtol=0, atol=1e-5
    )
    tensors["transformer.wte.weight"] = tensors["wte.weight"]
    with pytest.raises(InputError, match="wte.weight"):
        data.load_model(write(tmp_path, MODELS["gpt2"]["config"], tensors))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes(stored, wanted, tmp_path):
    tensors = {name: tensor.to(stored) for name, tensor in weights_of("qwen2 tied").items()}
    model = data.load_model(write(tmp_path, MODELS["qwen2 tied"]["config"], tensors), wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert torch.equal(model.wte.weight, tensors["model.embed_tokens.weight"].to(wanted))


def test_tensors_that_are_no_weights(tmp_path):
    tensors = weights_of("gpt2")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    data.load_model(write(tmp_path, MODELS["gpt2"]["config"], tensors))
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(InputError, match="lm_head.weight differs"):
        data.load_model(write(tmp_path, MODELS["gpt2"]["config"], tensors))
    tensors = weights_of("llama tied") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    data.load_model(write(tmp_path, MODELS["llama tied"]["config"], tensors))


def test_wrong_tensors_are_named(tmp_path):
    tensors = weights_of("mistral")
    name = "model.layers.1.mlp.up_proj.weight"
    for broken in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {name: tensors[name][:-1]},
        tensors | {name: tensors[name].T.contiguous()},
        tensors | {name: torch.ones(40, 24, dtype=torch.bool)},
    ):
        with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight"):
            data.load_model(write(tmp_path, MODELS["mistral"]["config"], broken))
    with pytest.raises(InputError, match="layers.0.mlp.extra"):
        data.load_model(
            write(tmp_path, MODELS["mistral"]["config"], tensors | {"layers.0.mlp.extra": torch.ones(1)})
        )


def test_shards(tmp_path):
    folder = write(tmp_path, MODELS["mistral"]["config"], weights_of("mistral"), shards=2)
    first, second = sorted(folder.glob("model*.safetensors"))
    second.rename(tmp_path / "kept")
    with pytest.raises(InputError, match="is missing"):
        data.load_model(folder)
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="in another file"):
        data.load_model(folder)
    (tmp_path / "kept").rename(second)
    data.load_model(folder)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(InputError, match="no model at"):
        data.load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        data.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODELS["gpt2"]["config"]))
    with pytest.raises(InputError, match="tensor .* is missing"):
        data.load_model(tmp_path)
    with pytest.raises(InputError, match="neither"):
        data.load_model(tmp_path / "config.json")
    for broken in (
        b"",
        b"[1]",
        b"\xff\xfe",
        b"{" * 100000,
        b'{"a":' * 100000,
        b"1" * 9999,
    ):
        (tmp_path / "config.json").write_bytes(broken)
        with pytest.raises(InputError, match="config.json"):
            data.load_model(tmp_path)


@pytest.mark.parametrize("named", ({}, {"dtype": "float32"}, {"torch_dtype": "float32"}))
def test_the_type_that_was_written_is_the_type_that_is_named(named, tmp_path):
    """Under both names: that of transformers 5 and the older one."""
    config, weights = MODELS["qwen3"]["config"] | named, weights_of("qwen3")
    (tmp_path / "a").mkdir()
    source = write(tmp_path / "a", config, weights)
    (source / "tokenizer.json").write_bytes((find("base") / "tokenizer.json").read_bytes())
    data.write_checkpoint(tmp_path / "b", source, data.load_model(source).state_dict(), torch.bfloat16)
    described = json.loads((tmp_path / "b" / "config.json").read_text())
    assert described == config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert not (tmp_path / "b" / "generation_config.json").exists()
    (source / "generation_config.json").write_bytes(b'{"top_k": 64}')
    data.write_checkpoint(tmp_path / "b", source, data.load_model(source).state_dict(), torch.bfloat16)
    assert (tmp_path / "b" / "generation_config.json").read_bytes() == b'{"top_k": 64}'
