"""Tensors of a model or state dict by name, whatever it was wrapped in."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .memory import check_memory

# what torch.compile, FSDP and activation checkpointing put into names
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

Model = nn.Module | Mapping[str, Tensor]


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names without those of wrappers, to the names given: "module." where all start with it (DDP), "_orig_mod."."""
    given = list(names)
    short_names = given
    for wrapper in _WRAPPERS:
        short_names = [name.replace(wrapper, "") for name in short_names]
    if all(name.startswith("module.") for name in short_names):
        short_names = [name.removeprefix("module.") for name in short_names]
    # a model may hold a module beside its compiled self
    distinct = len(set(short_names)) == len(given)
    return dict(zip(short_names if distinct else given, given, strict=True))


def named_tensors(argument: str, model: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers by plain name, tied ones under each of theirs. Nothing is copied."""
    if isinstance(model, nn.Module):
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        for name, buffer in model.named_buffers(remove_duplicate=False):
            path, _, attribute = name.rpartition(".")
            if attribute not in model.get_submodule(path)._non_persistent_buffers_set:
                tensors[name] = buffer
    elif isinstance(model, Mapping):
        tensors = dict(model)
    else:
        raise TypeError(
            f"`{argument}`: expected a module or a state dict, got {type(model).__name__}; pass model or "
            "model.state_dict()"
        )
    found = {}
    for plain, name in plain_names(tensors).items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"`{argument}`[{name!r}]: expected a tensor, got {type(tensor).__name__}; pass the state dict alone, "
                "without what is no tensor"
            )
        if hasattr(tensor, "full_tensor") or tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
            got = "a DTensor" if hasattr(tensor, "full_tensor") else f"one on {tensor.device} of {tensor.layout}"
            got = "a nested one" if tensor.is_nested else got
            raise TypeError(
                f"`{argument}`[{name!r}]: expected a strided tensor in memory, got {got}; gather the full state dict "
                "first"
            )
        if tensor.is_neg() or tensor.is_conj():
            raise TypeError(
                f"`{argument}`[{name!r}]: expected values in memory, got a negated or conjugated view of others; clone "
                "it first"
            )
        check_memory(f"`{argument}`[{name!r}]", tensor)
        found[plain] = tensor.detach()
    return found


def same_keys(keys: Mapping[str, Hashable]) -> dict[str, str]:
    """Names whose key an earlier one has: name -> that one."""
    first: dict[Hashable, str] = {}
    return {name: owner for name, key in keys.items() if (owner := first.setdefault(key, name)) != name}


def memory(tensor: Tensor) -> Hashable:
    """Equal for tensors that are one."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def listing(names: Collection[str]) -> str:
    """The first three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, list(names)[:3])) + more


def check_same_kind(argument: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError for a tensor of another shape or dtype."""
    if tensor.shape != shape:
        raise ValueError(
            f"`{argument}`: expected shape {shape} for {name!r}, got {tuple(tensor.shape)}: another model; load "
            "one of the same architecture"
        )
    if tensor.dtype != dtype:
        raise ValueError(
            f"`{argument}`: expected {short(dtype)} for {name!r}, got {short(tensor.dtype)}; convert the model to "
            f"{short(dtype)} first, and to another dtype afterwards"
        )


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")
