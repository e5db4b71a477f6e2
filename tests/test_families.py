"""Every family against a plain implementation and the transformers library's numbers."""

import json
import math

import pytest
import torch
from hub import FIXTURE, IDS, MODELS, SCALED, logits_of, weights_of, write
from plain import Plain

import data
from data.config import gpt_config
from data.files import find
from data.safetensors import open_safetensors


@pytest.mark.parametrize("title", MODELS)
def test_families(title, tmp_path):
    config, tensors = MODELS[title]["config"], weights_of(title)
    logits = logits_of(data.load_model(write(tmp_path, config, tensors)))
    expected = torch.stack([Plain(config, tensors).logits(ids) for ids in FIXTURE["ids"]])
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    library = torch.tensor(MODELS[title]["logits"])
    torch.testing.assert_close(logits[:, [0, 5, 11]], library, rtol=0, atol=1e-5)


@pytest.mark.parametrize("title", MODELS)
def test_written_and_read_back(title, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = write(tmp_path / "a", MODELS[title]["config"], weights_of(title), shards=3)
    model = data.load_model(source)
    (source / "tokenizer.json").write_bytes((find("base") / "tokenizer.json").read_bytes())
    data.write_checkpoint(tmp_path / "b", source, model.state_dict(), torch.float32)
    again = data.load_model(tmp_path / "b")
    assert again.config == model.config
    assert torch.equal(logits_of(again), logits_of(model))
    stored = open_safetensors(tmp_path / "b" / "model.safetensors")
    assert stored.keys() == MODELS[title]["shapes"].keys()  # the names that the library writes
    described = json.loads((tmp_path / "b" / "config.json").read_text())
    expected = torch.stack(
        [Plain(described, {n: load() for n, load in stored.items()}).logits(ids) for ids in IDS]
    )
    torch.testing.assert_close(logits_of(model).double(), expected, rtol=0, atol=1e-5)


def test_older_rope_spelling(tmp_path):
    model = MODELS[SCALED]
    rope = dict(model["config"]["rope_parameters"])
    config = {name: value for name, value in model["config"].items() if name != "rope_parameters"}
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    logits = logits_of(data.load_model(write(tmp_path, config, weights_of(SCALED))))
    torch.testing.assert_close(logits[:, [0, 5, 11]], torch.tensor(model["logits"]), rtol=0, atol=1e-5)


OLDER = {  # what released files say instead of what the library writes today
    "mistral, window": {},
    "qwen2, window": {"layer_types": ...},
    "qwen3, window": {"layer_types": ...},
    "gemma2": {"layer_types": ..., "rope_parameters": ..., "rope_theta": 600.0, "hidden_act": "ignored",
               "tie_word_embeddings": ...},
    "gemma3": {"layer_types": ..., "sliding_window_pattern": 2, "rope_parameters": ..., "rope_theta": 900.0,
               "rope_local_base_freq": 20.0, "rope_scaling": None, "tie_word_embeddings": ...},
}  # fmt: skip


@pytest.mark.parametrize("title", OLDER)
def test_older_spellings(title, tmp_path):
    model = MODELS[title]
    config = {name: value for name, value in (model["config"] | OLDER[title]).items() if value is not ...}
    logits = logits_of(data.load_model(write(tmp_path, config, weights_of(title))))
    torch.testing.assert_close(logits[:, [0, 5, 11]], torch.tensor(model["logits"]), rtol=0, atol=1e-5)


def test_a_missing_field_is_not_always_null(tmp_path):
    """The library's defaults, as a config.json without these fields means them."""
    gone = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "layer_types")
    config = {name: value for name, value in MODELS["gemma2"]["config"].items() if name not in gone}
    found = data.load_model(write(tmp_path, config, weights_of("gemma2"))).config
    assert (found.windows, found.attn_cap, found.logit_cap) == ([4096, None], 50.0, 30.0)
    config = MODELS["gemma2"]["config"] | dict.fromkeys(gone)
    found = data.load_model(write(tmp_path, config, weights_of("gemma2"))).config
    assert (found.windows, found.attn_cap, found.logit_cap) == ([None, None], None, None)
    config = {n: v for n, v in MODELS["gemma3"]["config"].items() if n not in (*gone, "rope_parameters")}
    config |= {"num_hidden_layers": 7}
    found = gpt_config("config.json", config)
    assert found.windows == [4096] * 5 + [None, 4096]
    assert (found.rope_theta, found.rope_local_theta) == (1e6, 1e4)
    config = {n: v for n, v in MODELS["qwen3, window"]["config"].items() if n not in gone}
    assert gpt_config("config.json", config).windows == [None, 4096]
    config.pop("use_sliding_window")
    assert gpt_config("config.json", config).windows == [None, None]


WRONG = [  # (model, changes of its config, what the message names); ... takes the field away
    ("gpt2", {"model_type": "bert"}, "bert"),
    ("gpt2", {"model_type": ...}, "model_type"),
    ("gpt2", {"n_embd": ...}, "n_embd"),
    ("gpt2", {"n_embd": "24"}, "n_embd"),
    ("gpt2", {"n_embd": True}, "n_embd"),
    ("gpt2", {"n_embd": 24.0}, "n_embd"),
    ("gpt2", {"n_embd": -24}, "n_embd"),
    ("gpt2", {"n_embd": 10**30}, "n_embd"),
    ("gpt2", {"n_head": 5}, "5 heads"),
    ("gpt2", {"n_layer": 10**6}, "1000000 layers"),
    ("gpt2", {"layer_norm_epsilon": None}, "layer_norm_epsilon"),
    ("gpt2", {"layer_norm_epsilon": math.nan}, "layer_norm_epsilon"),
    ("gpt2", {"activation_function": "tanh"}, "activation.*tanh"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("opt", {"do_layer_norm_before": 1}, "do_layer_norm_before"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ("opt", {"word_embed_proj_dim": "12"}, "word_embed_proj_dim"),
    ("opt", {"word_embed_proj_dim": 12}, "project_in"),
    ("opt", {"ffn_dim": ...}, "ffn_dim"),
    ("llama tied", {"num_key_value_heads": 4}, "4 key/value heads"),
    ("llama tied", {"head_dim": 7}, "head has 7"),
    ("llama tied", {"hidden_act": "gelu_fast"}, "activation.*gelu_fast"),
    ("llama tied", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type.*yarn"),
    ("llama tied", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ("llama tied", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
    ("llama tied", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    (SCALED, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("qwen2 tied", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("qwen2, window", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ("qwen2, window", {"layer_types": None, "max_window_layers": -1}, "max_window_layers"),
    ("llama tied", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, "layer_types"),
    ("mistral, window", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("mistral, window", {"use_sliding_window": False}, "use_sliding_window"),
    ("mistral, window", {"sliding_window": 0}, "sliding_window"),
    ("qwen3, window", {"head_dim": ...}, "head_dim"),
    ("gemma2", {"query_pre_attn_scalar": ...}, "query_pre_attn_scalar"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["full_attention"]}, "1 windows for 2 layers"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
    ("gemma3", {"model_type": "gemma3"}, "model_type"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    ("gemma3", {"rope_parameters": {"full_attention": 3}}, "full_attention"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, "linear"),
    ("gemma3", {"rope_parameters": {"sliding_attention": dict(MODELS[SCALED]["config"]["rope_parameters"])}},
     "sliding_attention"),
]


@pytest.mark.parametrize(("title", "changes", "named"), WRONG)
def test_unsupported_options_are_named(title, changes, named, tmp_path):
    config = {name: value for name, value in (MODELS[title]["config"] | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=named):
        data.load_model(write(tmp_path, config, weights_of(title)))
