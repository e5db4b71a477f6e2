"""Random small checkpoints of every family, written by the transformers library, read here, and back."""

import random

import pytest
import torch

import data
from data.files import find

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")

ROPE = {"rope_type": "default", "rope_theta": 300.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 3.0, "original_max_position_embeddings": 16}  # fmt: skip
TOKENS, CONTEXT = 61, 24


def settings_of(kind, chance):
    """Settings of a random config of the family."""
    heads, size = chance.choice((2, 3, 4)), chance.choice((4, 6))
    common = dict(vocab_size=TOKENS, tie_word_embeddings=chance.random() < 0.5,
                  pad_token_id=None, bos_token_id=None, eos_token_id=None)  # fmt: skip
    if kind == "gpt2":
        return common | dict(n_embd=heads * size, n_head=heads, n_layer=3, n_positions=CONTEXT,
                             n_inner=chance.choice((None, 20)))  # fmt: skip
    common |= dict(num_hidden_layers=3, num_attention_heads=heads, max_position_embeddings=CONTEXT)
    if kind == "opt":
        return common | dict(hidden_size=heads * size, ffn_dim=20, enable_bias=chance.random() < 0.5,
                             do_layer_norm_before=chance.random() < 0.5,
                             word_embed_proj_dim=chance.choice((None, 5)))  # fmt: skip
    common |= dict(hidden_size=heads * 4, num_key_value_heads=chance.choice((1, heads)),
                   intermediate_size=20, rms_norm_eps=1e-4)  # fmt: skip
    # The library's cache keeps everything where the window is 1.
    windows = dict(sliding_window=chance.choice((2, 3, 5)))
    biased = dict(attention_bias=chance.random() < 0.5)
    some = [chance.choice(("sliding_attention", "full_attention")) for _ in range(3)]
    layers = chance.choice(({}, {"layer_types": some}))
    gemma = dict(head_dim=size, query_pre_attn_scalar=chance.choice((5, 12)), **windows, **layers, **biased)
    qwen = dict(use_sliding_window=True, max_window_layers=chance.choice((0, 1, 2)), **windows)
    own = {
        "llama": dict(head_dim=size, mlp_bias=chance.random() < 0.5, **biased),
        "mistral": dict(head_dim=size, **windows),
        "qwen2": qwen,
        "qwen3": dict(head_dim=size, **qwen, **biased),
        "gemma2": dict(attn_logit_softcapping=chance.choice((None, 2.0)),
                       final_logit_softcapping=chance.choice((None, 3.0)), **gemma),
        "gemma3_text": dict(final_logit_softcapping=chance.choice((None, 3.0)), **gemma),
    }[kind]  # fmt: skip
    rope = chance.choice((ROPE, LLAMA3))
    if kind == "gemma3_text":
        rope = {"full_attention": dict(rope), "sliding_attention": ROPE | {"rope_theta": 20.0}}
    return common | own | {"rope_parameters": dict(rope)}


def written(folder, kind, seed, dtype, **how):
    """A folder that the library wrote, with random weights as `dtype`; returns its reading as float32."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **settings_of(kind, random.Random(seed)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_bytes((find("base") / "tokenizer.json").read_bytes())
    return opened(folder)


def opened(folder):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, attn_implementation="eager", dtype=torch.float32)


def logits_of(model, ids):
    with torch.no_grad():
        found = model(ids)
    return found.logits if hasattr(found, "logits") else found[0]


FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_logits_and_the_same_continuation_past_every_window(kind, seed, tmp_path):
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    how = {"max_shard_size": "5KB"} if seed % 3 == 0 else {}
    theirs = written(tmp_path, kind, seed, dtype, **how)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(how)
    ours = data.load_model(tmp_path)
    ids = torch.randint(0, TOKENS, (2, CONTEXT))
    expected = logits_of(theirs, ids)
    torch.testing.assert_close(logits_of(ours, ids), expected, rtol=1e-5, atol=1e-5)
    prompt, how = ids[:, :4], dict(max_new_tokens=CONTEXT - 4, do_sample=False, pad_token_id=0)
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    assert torch.equal(ours.generate(prompt, CONTEXT - 4), continued)


@pytest.mark.parametrize("kind", FAMILIES)
def test_written_for_the_library(kind, tmp_path):
    """What is read and written again is the same to the library, weight by weight and bit by bit."""
    dtype = (torch.float32, torch.bfloat16)[FAMILIES.index(kind) % 2]
    theirs = written(tmp_path / "a", kind, 3, dtype)
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [7, 9], "top_k": 13}')
    ours = data.load_model(tmp_path / "a", dtype)
    data.write_checkpoint(tmp_path / "b", tmp_path / "a", ours.state_dict(), dtype)
    again = opened(tmp_path / "b")
    assert again.generation_config.eos_token_id == [7, 9] and again.generation_config.top_k == 13
    found, expected = again.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        first = 2 if name.endswith("embed_positions.weight") else 0  # OPT's rows before position 0
        assert torch.equal(found[name][first:], tensor[first:]), name
    ids = torch.randint(0, TOKENS, (2, CONTEXT))
    assert torch.equal(logits_of(again, ids), logits_of(theirs, ids))


@pytest.mark.parametrize("wanted", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16))
def test_the_library_opens_the_type_that_was_written(stored, wanted, tmp_path):
    written(tmp_path / "a", "qwen3", 1, stored)
    tensors = data.load_model(tmp_path / "a").state_dict()
    data.write_checkpoint(tmp_path / "b", tmp_path / "a", tensors, wanted)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert {parameter.dtype for parameter in again.parameters()} == {wanted}
