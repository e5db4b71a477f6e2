"""GGUF files: their settings in the words of a config.json, and their tensors, by way of the package gguf.

Sources: github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format; what a file leaves out is as
github.com/ggml-org/llama.cpp takes it. Nothing that a file says about itself is trusted.
"""

import functools
import math
import mmap
import struct

import numpy as np
import torch

from data.files import InputError, one_of, read_field

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9  # the other kinds of values
FIELDS = {  # a .gguf file's field, after the architecture's name -> config.json's
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {  # by their names: the model_type, and what holds for it without being said
    "llama": ("llama", {"hidden_act": "silu"}),
    "qwen2": ("qwen2", {"hidden_act": "silu"}),
    "qwen3": ("qwen3", {"hidden_act": "silu"}),
    "gemma2": ("gemma2", GELU),
    "gemma3": ("gemma3_text", GELU),
}
SPECIALS = {"bos": "bos", "eos": "eos", "pad": "padding"}  # config.json's name of a token -> a .gguf file's
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the models whose queries are scaled by another width
GGUF_NAMES = {  # model.py's module -> the stored one; {} is a block's number
    "wte": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "norm1": "blk.{}.attn_norm",
    "attn.q": "blk.{}.attn_q",
    "attn.k": "blk.{}.attn_k",
    "attn.v": "blk.{}.attn_v",
    "attn.o": "blk.{}.attn_output",
    "attn.q_norm": "blk.{}.attn_q_norm",
    "attn.k_norm": "blk.{}.attn_k_norm",
    "norm1_out": "blk.{}.post_attention_norm",
    "norm2": "blk.{}.ffn_norm",
    "mlp.gate": "blk.{}.ffn_gate",
    "mlp.up": "blk.{}.ffn_up",
    "mlp.down": "blk.{}.ffn_down",
    "norm2_out": "blk.{}.post_ffw_norm",
}


class _Header:
    """Reads values one after the other, from the start of a file; a ValueError or struct.error at its end."""

    def __init__(self, content):
        self.content, self.at = content, 0

    def numbers(self, code, count=1):
        layout = struct.Struct(f"<{count}{code}")
        values = layout.unpack_from(self.content, self.at)
        self.at += layout.size
        return list(values)

    def text(self):
        (length,) = self.numbers("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self.content):
            raise ValueError("it ends too early")
        return str(self.content[start : self.at], "utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = *self.numbers("I"), *self.numbers("Q")
            if inner == STRING:
                return [self.text() for _ in range(count)]
            return self.numbers(SCALARS[inner], count)
        return self.numbers(SCALARS[kind])[0]


def read_gguf(path):
    """({key: value}, {tensor: (shape, number of its type, position)}) of a GGUF file, else InputError."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _read_header(_Header(content))
    except (ValueError, KeyError, struct.error) as error:
        problem = f"{type(error).__name__}: {str(error):.300}"
        raise InputError(f"{path} cannot be read as GGUF ({problem})") from None


def _read_header(header):
    if header.content[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    header.at = 4
    version, (n_tensors, n_values) = *header.numbers("I"), header.numbers("Q", 2)
    if version not in (2, 3):
        raise ValueError(f"version {version} is not supported, only 2 and 3, little-endian")
    values, tensors = {}, {}
    for _ in range(n_values):
        key = header.text()
        values[key] = header.value(*header.numbers("I"))
    for _ in range(n_tensors):
        name = header.text()
        shape = tuple(reversed(header.numbers("Q", *header.numbers("I"))))
        tensors[name] = shape, *header.numbers("I"), *header.numbers("Q")
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment = {alignment!r:.100} cannot be used")
    start = header.at + -header.at % alignment
    return values, {name: (shape, kind, start + offset) for name, (shape, kind, offset) in tensors.items()}


def gguf_fields(path):
    """The settings of the .gguf file `path` as they would stand in a config.json."""
    values, tensors = read_gguf(path)
    name = one_of(path, "architecture", values.get("general.architecture"), ARCHITECTURES)
    family, unsaid = ARCHITECTURES[name]
    fields = {"model_type": family, "tie_word_embeddings": "output.weight" not in tensors, **unsaid}
    fields["vocab_size"] = len(read_field(path, values, "tokenizer.ggml.tokens", list))
    for key, value in values.items():
        if key.startswith(f"{name}."):  # anything unknown about the architecture might change the result
            field = FIELDS[one_of(path, "field", key.removeprefix(f"{name}."), FIELDS)]
            one_of(path, key, value, (fields.setdefault(field, value),))
    fields.setdefault("rope_theta", 10000.0)
    for token, called in SPECIALS.items():
        fields[f"{token}_token_id"] = values.get(f"tokenizer.ggml.{called}_token_id")
    return fields | (_unsaid_of_gemma(path, name, fields) if name in LARGEST_GEMMA else {})


def _unsaid_of_gemma(path, name, fields):
    layers, width, heads, size = (read_field(path, fields, field, int) for field in SIZES)
    unsaid = {"query_pre_attn_scalar": width // heads if layers == LARGEST_GEMMA[name] else size}
    if name == "gemma3" and "sliding_window" not in fields:  # for the others there is a default
        unsaid |= {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    return unsaid


def open_gguf(path, config):
    """{stored name: function that returns the tensor as float32} of the .gguf file `path`.

    config: its `GPTConfig`. What the tensors hold is as in the hub layout.
    """
    values, tensors = read_gguf(path)
    turned = values["general.architecture"] == "llama"
    load = functools.partial(_load, path, config, turned)
    return {name: functools.partial(load, name, *found) for name, found in tensors.items()}


def _load(path, config, turned, name, shape, kind, position):
    try:
        import gguf
    except ImportError:
        raise InputError(f"reading {path} takes the package gguf: pip install gguf") from None
    try:
        kind = gguf.GGMLQuantizationType(kind)
        rows = gguf.quant_shape_to_byte_shape(shape, kind)
        if position + math.prod(rows) > path.stat().st_size:
            raise ValueError("it ends outside the file")
        stored = np.memmap(path, dtype=np.uint8, mode="c", offset=position, shape=rows)
        tensor = torch.from_numpy(gguf.dequantize(stored, kind))
        if config.norm_offset and name.endswith("norm.weight"):
            tensor = tensor - 1  # the file has the gain itself
        if turned and name.endswith(("attn_q.weight", "attn_k.weight")):
            # Stored: the pair (i, i + D/2) of a head side by side. Here: first all i, then all i + D/2.
            pairs = tensor.view(-1, config.head_dim // 2, 2, tensor.shape[-1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    except (ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path}: tensor {name!r:.100} cannot be read: {error}") from None
    return tensor
