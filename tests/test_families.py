"""Every family against a plain implementation and the transformers library's numbers."""

import cmath
import json
import math

import numpy as np
import pytest
import torch
from hub import FIXTURE, IDS, MODELS, SCALED, logits_of, weights_of, write

import data
from data.config import gpt_config
from data.files import find
from data.safetensors import open_safetensors


class Plain:
    """The families once more, a vector at a time, in numpy, from config.json and the tensors as stored."""

    NAMES = {  # of the parts that Llama, Mistral and Qwen call otherwise
        "gpt2": dict(first="transformer.", wte="wte", block="h.", norm1="ln_1", norm2="ln_2",
                     out="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj", norm="ln_f"),
        "opt": dict(first="model.decoder.", norm1="self_attn_layer_norm", norm2="final_layer_norm",
                    out="self_attn.out_proj", up="fc1", down="fc2", norm="final_layer_norm"),
        "gemma2": dict(norm2="pre_feedforward_layernorm"),
        "gemma3_text": dict(norm2="pre_feedforward_layernorm"),
    }  # fmt: skip
    LLAMA = dict(first="model.", wte="embed_tokens", block="layers.", norm1="input_layernorm",
                 norm2="post_attention_layernorm", out="self_attn.o_proj", gate="mlp.gate_proj",
                 up="mlp.up_proj", down="mlp.down_proj", norm="norm")  # fmt: skip

    def __init__(self, config, tensors):
        self.config, self.kind = config, config["model_type"]
        self.get = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        self.names = self.LLAMA | self.NAMES.get(self.kind, {})
        self.hidden = config.get("n_embd") or config["hidden_size"]
        self.n_layer = config.get("n_layer") or config["num_hidden_layers"]
        self.n_head = config.get("n_head") or config["num_attention_heads"]
        self.n_kv = config.get("num_key_value_heads") or self.n_head
        self.size = config.get("head_dim") or self.hidden // self.n_head
        self.rotary = self.kind not in ("gpt2", "opt")
        self.gemma = self.kind.startswith("gemma")
        self.norms_last = config.get("do_layer_norm_before") is False
        self.kinds = config.get("layer_types") or ["full_attention"] * self.n_layer
        if self.kind == "mistral" and config["sliding_window"]:
            self.kinds = ["sliding_attention"] * self.n_layer

    def linear(self, x, name):
        weight = self.get[name + ".weight"]
        y = x @ weight if self.kind == "gpt2" else x @ weight.T
        return y + self.get[name + ".bias"] if name + ".bias" in self.get else y

    def norm(self, x, name):
        if name + ".weight" not in self.get:
            return x
        weight = self.get[name + ".weight"]
        if self.rotary:
            return x / math.sqrt(np.mean(x * x) + self.config["rms_norm_eps"]) * (weight + self.gemma)
        scale = math.sqrt(x.var() + self.config.get("layer_norm_epsilon", 1e-5))
        return (x - x.mean()) / scale * weight + self.get[name + ".bias"]

    def activate(self, x):
        names = ("hidden_activation", "hidden_act", "activation_function")
        name = next(self.config[name] for name in names if name in self.config)
        if name == "relu":
            return np.maximum(x, 0)
        if name == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def cap(self, x, name):
        cap = self.config.get(name)
        return cap * np.tanh(x / cap) if cap else x

    def speed(self, i, half, layer):
        """By how much the i-th pair of channels turns from one position to the next."""
        rope = self.config.get("rope_parameters") or {
            "rope_theta": self.config["rope_theta"],
            **(self.config["rope_scaling"] or {}),
        }
        rope = rope.get(self.kinds[layer], rope)
        speed = rope["rope_theta"] ** (-i / half)
        if rope.get("rope_type", "default") != "llama3":
            return speed
        wavelength, context = 2 * math.pi / speed, rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength > context / low:
            return speed / rope["factor"]
        if wavelength > context / high:
            smooth = (context / wavelength - low) / (high - low)
            return (1 - smooth) * speed / rope["factor"] + smooth * speed
        return speed

    def turn(self, x, position, layer):
        if not self.rotary:
            return x
        half = len(x) // 2
        y = np.empty_like(x)
        for i in range(half):
            turned = complex(x[i], x[i + half]) * cmath.exp(1j * position * self.speed(i, half, layer))
            y[i], y[i + half] = turned.real, turned.imag
        return y

    def embed(self, ids):
        table = self.get[self.names["first"] + self.names["wte"] + ".weight"]
        xs = [table[i] * (math.sqrt(self.hidden) if self.gemma else 1) for i in ids]
        if "model.decoder.project_in.weight" in self.get:
            xs = [self.linear(x, "model.decoder.project_in") for x in xs]
        if self.kind == "gpt2":
            xs = [x + self.get["transformer.wpe.weight"][t] for t, x in enumerate(xs)]
        if self.kind == "opt":
            xs = [x + self.get["model.decoder.embed_positions.weight"][t + 2] for t, x in enumerate(xs)]
        return table, xs

    def heads(self, x, block, position, layer):
        """The queries, keys and values of one position, each a list of heads."""
        if self.kind == "gpt2":
            q, k, v = np.split(self.linear(x, block + "attn.c_attn"), 3)
        else:
            q, k, v = (self.linear(x, block + f"self_attn.{part}_proj") for part in "qkv")
        q, k, v = (np.split(part, len(part) // self.size) for part in (q, k, v))
        q = [self.norm(head, block + "self_attn.q_norm") for head in q]
        k = [self.norm(head, block + "self_attn.k_norm") for head in k]
        return [self.turn(head, position, layer) for head in q], [self.turn(h, position, layer) for h in k], v

    def attend(self, xs, block, layer):
        scalar = self.config.get("query_pre_attn_scalar") or self.size
        window = self.config["sliding_window"] if self.kinds[layer] == "sliding_attention" else len(xs)
        norm = block + self.names["norm1"]
        read = [self.heads(x if self.norms_last else self.norm(x, norm), block, t, layer)
                for t, x in enumerate(xs)]  # fmt: skip
        for t, x in enumerate(xs):
            mixed, seen = [], read[max(0, t + 1 - window) : t + 1]
            for h in range(self.n_head):
                shared = h // (self.n_head // self.n_kv)
                scores = np.array([read[t][0][h] @ keys[shared] / math.sqrt(scalar) for _, keys, _ in seen])
                scores = self.cap(scores, "attn_logit_softcapping")
                share = np.exp(scores - max(scores))
                share /= share.sum()
                mixed.append(sum(p * values[shared] for p, (_, _, values) in zip(share, seen)))
            y = self.linear(np.concatenate(mixed), block + self.names["out"])
            y = self.norm(y, block + "post_attention_layernorm") if self.gemma else y
            yield self.norm(x + y, norm) if self.norms_last else x + y

    def feed_forward(self, x, block):
        norm = block + self.names["norm2"]
        normed = x if self.norms_last else self.norm(x, norm)
        inner = self.linear(normed, block + self.names["up"])
        if self.rotary:
            inner = self.activate(self.linear(normed, block + self.names["gate"])) * inner
        else:
            inner = self.activate(inner)
        y = self.linear(inner, block + self.names["down"])
        y = self.norm(y, block + "post_feedforward_layernorm") if self.gemma else y
        return self.norm(x + y, norm) if self.norms_last else x + y

    def logits(self, ids):
        """(T, vocab) for one sequence of T tokens."""
        table, xs = self.embed(ids)
        for layer in range(self.n_layer):
            block = f"{self.names['first']}{self.names['block']}{layer}."
            xs = [self.feed_forward(x, block) for x in self.attend(xs, block, layer)]
        xs = [self.norm(x, self.names["first"] + self.names["norm"]) for x in xs]
        if "model.decoder.project_out.weight" in self.get:
            xs = [self.linear(x, "model.decoder.project_out") for x in xs]
        head = self.get.get("lm_head.weight", table)
        return torch.tensor(self.cap(np.array([head @ x for x in xs]), "final_logit_softcapping"))


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
