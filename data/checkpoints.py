"""Checkpoints to models and back: the hub layout (config.json and safetensors), and GGUF."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from data.config import gpt_config
from data.families import FAMILIES
from data.files import InputError, find, read_json, write_file, write_json
from data.gguf import GGUF_NAMES, gguf_fields, open_gguf
from data.safetensors import open_safetensors, safetensors_bytes
from data.tokenizer import write_tokenizer
from model import GPT

# Masks and constants that are stored among the weights.
NON_WEIGHTS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")
PREFIX = re.compile(r"(transformer|model)\.")  # files may leave it out
DTYPE_FIELDS = ("dtype", "torch_dtype")  # of a config.json: as transformers 5 and earlier ones call it


def load_model(name, dtype=torch.float32):
    """The `GPT` in a checkpoint folder of the hub layout, in a .gguf file, or behind a name of `find`.

    "scratch" has the base's shape and random weights.
    dtype: of the weights. Raises InputError, which names the file and what is wrong with it; so it does for
    an option that would change the model's outputs and that model.py does not implement.
    """
    path = find(name)
    fields = read_fields(path)
    config = gpt_config(path, fields)
    if name == "scratch":
        return GPT(config).to(dtype)
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    family = FAMILIES[fields["model_type"]]
    if path.suffix == ".gguf":
        stored, family = open_gguf(path, config), replace(family, names=GGUF_NAMES)
    else:
        stored = _open_folder(path)
    model.load_state_dict(_read_weights(path, family, stored, shapes, dtype), assign=True)
    return model


def read_fields(path):
    """What stands in the config.json of the folder `path`, or would stand there for a .gguf file."""
    return gguf_fields(path) if path.suffix == ".gguf" else read_json(path / "config.json")


def _open_folder(folder):
    """{stored name: function that returns the tensor} of a folder in the hub layout."""
    stored = {}
    # Several files have an index, which says no more than their headers do.
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors = open_safetensors(shard)
        if twice := sorted(tensors.keys() & stored.keys()):
            raise InputError(f"{shard}: tensor {twice[0]!r:.100} stands in another file, too")
        stored |= tensors
    return {name: load for name, load in stored.items() if not NON_WEIGHTS.fullmatch(name)}


def _read_weights(path, family, stored, shapes, dtype):
    """The tensors {name: tensor} for `shapes` {name: shape}, by model.py's names, as `dtype` on the CPU.

    stored: {stored name: function that returns the tensor}. Every tensor is converted by itself and let go
    of, so that memory peaks near the model's own size.
    Raises InputError for a tensor that is missing, left over, or of another shape.
    """
    sources = {}  # stored name -> model.py's names for it: several where the family fuses q, k and v
    for name in shapes:
        source = _source(family, name)
        source = source if source in stored else PREFIX.sub("", source, count=1)
        sources.setdefault(source, []).append(name)
    copied_head = stored.pop("lm_head.weight", None) if "head" not in shapes else None
    if different := sorted(sources.keys() ^ stored.keys()):
        what = "is missing" if different[0] in sources else "has no place in the model"
        raise InputError(f"{path}: tensor {different[0]!r:.100} {what}; {len(different)} tensors differ")
    tensors = {}
    for source, names in sources.items():
        rows = [shapes[name][0] for name in names]
        expected = (sum(rows), *shapes[names[0]][1:])
        whole = _rearrange(family, names[0], stored[source]())
        if tuple(whole.shape) != expected or not whole.is_floating_point():
            found = f"{whole.dtype} {tuple(whole.shape)}"
            raise InputError(f"{path}: tensor {source} does not fit: {found}, not floats of {expected}")
        for name, piece in zip(names, whole.split(rows)):
            tensors[name] = torch.empty(piece.shape, dtype=dtype).copy_(piece)
    if copied_head and not torch.equal(copied_head().to(dtype), tensors["wte.weight"]):
        raise InputError(f"{path}: lm_head.weight differs from the embedding that config.json ties it to")
    return tensors


def _source(family, name):
    """model.py's tensor name -> the family's."""
    module, _, kind = name.rpartition(".") if name != "head" else ("head", "", "weight")
    layer = ""
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
    return f"{family.names[module].format(layer)}.{kind}"


def _rearrange(family, name, tensor, back=False):
    """A stored tensor as model.py has it under `name`, or back."""
    if family.transposed and name.startswith("blocks.") and tensor.dim() == 2:
        return tensor.T
    if name == "wpe.weight" and family.first_position:
        # The rows before position 0 serve padding on the left.
        before = torch.zeros_like(tensor[: family.first_position])
        return torch.cat((before, tensor)) if back else tensor[family.first_position :]
    return tensor


def write_checkpoint(folder, source, tensors, dtype):
    """Write a model in the hub layout: `tensors` {model.py's name: tensor} as `dtype`.

    Settings, tokenizer and what a folder says about generation are those of `source`, a model of the same
    shape, as `find` reads it.
    """
    path, kept = find(source), "generation_config.json"
    described = read_fields(path) | dict.fromkeys(DTYPE_FIELDS, str(dtype).removeprefix("torch."))
    family = FAMILIES[described["model_type"]]
    parts = {}  # stored name -> its pieces: q, k and v where the family fuses them
    for name, tensor in tensors.items():
        piece = _rearrange(family, name, tensor.detach().cpu(), back=True)
        parts.setdefault(_source(family, name), []).append(piece)
    # The only fused tensors are gpt2's, which are transposed.
    stored = {source: torch.cat(pieces, dim=-1) for source, pieces in parts.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", safetensors_bytes(stored, dtype))
    write_json(folder / "config.json", described)
    if (path / kept).is_file():
        write_file(folder / kept, (path / kept).read_bytes())
    write_tokenizer(folder, source)
