"""A pretend accelerator, for machines without one: it computes on the CPU but refuses what CUDA would refuse.

Its tensors say that they are on the device "pretend", hold a CPU tensor, and raise where they meet one of the
CPU's. What it cannot show: kernels, speed, streams, and code that asks for "cuda" by name.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
COPIES = {"copy_", "_to_copy"}  # the operations that may mix devices
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # may take places from the CPU


class Pretend(torch.Tensor):
    """The tensor `held`, as if it were on the device."""

    @staticmethod
    def __new__(cls, held):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE)  # fmt: skip
        wrapper.held = held
        return wrapper

    def __init__(self, held):
        pass

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = Pretend(self.held.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While entered, tensors can be made on the device "pretend"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation: checked, computed on what the tensors hold, and wrapped again."""
    name = func._schema.name.removeprefix("aten::")
    if name == "_fused_sdp_choice":
        return torch.nn.attention.SDPBackend.MATH.value  # the others ask for real memory
    flat, structure = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    check(name, args, tensors, ours)
    held = {id(tensor.held): tensor for tensor in ours}
    args, kwargs = pytree.tree_unflatten([getattr(value, "held", value) for value in flat], structure)
    target = kwargs.get("device")
    if target is not None and torch.device(target).type == DEVICE.type:
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    here = bool(ours) if target is None else torch.device(target).type == DEVICE.type
    if name == "copy_":
        here = id(args[0]) in held

    def wrap(value):
        if id(value) in held:
            return held[id(value)]  # in place
        return Pretend(value) if here and isinstance(value, torch.Tensor) else value

    return pytree.tree_map(wrap, result)


def check(name, args, tensors, ours):
    """Raise as CUDA does where an operation is given tensors of both devices; single numbers may mix."""
    others = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.dim()]
    if not ours or not others or name in COPIES:
        return
    values = args[2] if name in INDEXING and len(args) > 2 else args[0]
    if name in INDEXING and isinstance(args[0], Pretend) and isinstance(values, Pretend):
        return
    raise RuntimeError(f"{name}: expected all tensors to be on the same device")


def put(module):
    """Move a module's parameters and buffers to the device; returns the module."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = Pretend(parameter.detach().clone())
                part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = Pretend(buffer)
    return module


def back(tree):
    """Nested lists, tuples and dicts with their tensors copied to the CPU."""
    return pytree.tree_map(lambda value: value.held.clone() if isinstance(value, Pretend) else value, tree)
