"""GGUF files, read by the package gguf: their settings in the words of a config.json, and their tensors.

Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import functools

import torch

from data.files import InputError, one_of, read_field

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
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
}
GGUF_NAMES = {  # model.py's module -> the stored one; {} is a block's number
    "wte": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "norm1": "blk.{}.attn_norm",
    "attn.q": "blk.{}.attn_q",
    "attn.k": "blk.{}.attn_k",
    "attn.v": "blk.{}.attn_v",
    "attn.o": "blk.{}.attn_output",
    "norm2": "blk.{}.ffn_norm",
    "mlp.gate": "blk.{}.ffn_gate",
    "mlp.up": "blk.{}.ffn_up",
    "mlp.down": "blk.{}.ffn_down",
}


def read_gguf(path):
    """({key: value}, {name: the package's description of the tensor}) of a GGUF file, else InputError."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"reading {path} takes the package gguf: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **order):
            found = super()._get(offset, dtype, count, **order)
            if len(found) < count:  # else an array that claims to be huge would be read for ever
                raise ValueError("it ends too early")
            return found

    try:
        reader = Reader(path, "c")
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # whatever the package stumbles over in a broken file
        raise InputError(f"{path} cannot be read as GGUF: {error}") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def gguf_fields(path):
    """The settings of the .gguf file `path` as they would stand in a config.json."""
    metadata, tensors = read_gguf(path)
    family = one_of(path, "architecture", metadata.get("general.architecture"), ("llama",))
    fields = {"model_type": family, "hidden_act": "silu", "tie_word_embeddings": "output.weight" not in tensors}
    fields["vocab_size"] = len(read_field(path, metadata, "tokenizer.ggml.tokens", list))
    for name, value in metadata.items():
        if name.startswith(f"{family}."):  # anything unknown about the architecture might change the result
            field = FIELDS[one_of(path, "field", name.removeprefix(f"{family}."), FIELDS)]
            one_of(path, name, value, (fields.setdefault(field, value),))
    return fields


def open_gguf(path, head_dim):
    """{stored name: function that returns the tensor as float32} of the .gguf file `path`."""
    tensors = read_gguf(path)[1]
    return {name: functools.partial(_dequantise, path, head_dim, tensors[name]) for name in tensors}


def _dequantise(path, head_dim, stored):
    import gguf

    try:
        tensor = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
        if stored.name.endswith(("attn_q.weight", "attn_k.weight")):
            # Stored: the pair (i, i + D/2) of a head side by side. Here: first all i, then all i + D/2.
            pairs = tensor.view(-1, head_dim // 2, 2, tensor.shape[-1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    except (ValueError, TypeError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        raise InputError(f"{path}: tensor {stored.name!r:.100} cannot be read: {error}") from None
    return tensor
