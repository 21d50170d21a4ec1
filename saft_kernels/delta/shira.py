"""PEFT's SHiRA adapters (Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175): the nn.Linear part of a delta, for `peft`.

An adapter is a folder. `adapter_model.safetensors` holds, per module, `base_model.model.<module>.shira_weight`, the
differences to the base, and `.shira_indices`, int32 (2, n): row and column. `adapter_config.json` has one `r` for all
modules, each of which has n = r * (in_features + out_features) elements.

Neither function needs PEFT.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..common import files, tensor_files
from ..common.names import Model, listing, named_tensors, plain_names, short
from ..mask import SparseMask
from ..ops.dtypes import INDEX_DTYPES, as_bits
from .changes import Changes

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(delta: Changes, folder: str | os.PathLike[str], base: nn.Module, *, partial: bool = False) -> Changes:
    """Writes the part of a delta that SHiRA can hold, the weights of nn.Linear modules, as an adapter.

    `peft.PeftModel.from_pretrained(base, folder)` loads it. Modules with fewer changes than r demands get further
    elements of difference zero. SHiRA holds differences in fp32 (fp64 for fp64 weights), 12 B per element, and adds
    them to the base: where that sum does not round to the delta's value, which takes a change by more than a factor of
    two, the adapter is off by that rounding; a warning says in how many elements.

    Args:
        delta: Its originals must be known.
        folder: Made if missing; the adapter's two files in it are replaced. A process that is killed meanwhile leaves
            the old adapter, the new one, or a folder without adapter_config.json, which nothing loads.
        base: A model that the delta fits. Not changed.
        partial: Leave out other changes (biases, norms, embeddings, nn.MultiheadAttention, which PEFT's SHiRA cannot
            hold) instead of refusing them.

    Returns:
        What was left out.

    Raises:
        TypeError: `base` is no module.
        ValueError: Changes elsewhere, with partial=False; none in nn.Linear weights; more changes in one module than
            any r allows.
    """
    if not isinstance(base, nn.Module):
        raise TypeError(
            f"`base`: expected a module, whose nn.Linear it adapts, got {type(base).__name__}; pass the model"
        )
    originals = delta.known_originals("to_shira")
    linears = _linear_weights(base)
    changed = [name for name in delta.mask if delta.mask[name].numel()]
    inside = [name for name in changed if name in linears]
    outside = [name for name in changed if name not in linears]
    # a linear weight that is tied to something else would change that, too
    outside += [name for name in inside if name in delta.tied.values()]
    inside = [name for name in inside if name not in outside]
    if outside and not partial:
        raise ValueError(
            f"`delta`: expected changes in nn.Linear weights alone, got some in {listing(outside)}; pass partial=True "
            "and keep the delta of the rest that it returns"
        )
    if not inside:
        raise ValueError("`delta`: expected changes in nn.Linear weights, got none; SHiRA cannot hold others")
    rank = max(-(-delta.mask[name].numel() // sum(delta.mask.shapes[name])) for name in inside)
    tensors: dict[str, Tensor] = {}
    inexact = 0
    for name in inside:
        out_features, in_features = delta.mask.shapes[name]
        count = rank * (out_features + in_features)
        if count > out_features * in_features:
            raise ValueError(
                f"`delta`: expected at most m * n // (m + n) * (m + n) changes in an m x n weight, with one r for all "
                f"modules, got r = {rank}, {count} elements, for {name!r} of {out_features * in_features}; it is too "
                "dense for SHiRA"
            )
        old, new = originals[name], delta.values[name]
        dtype = torch.float64 if old.dtype == torch.float64 else torch.float32
        difference = new.to(dtype) - old.to(dtype)
        inexact += int((as_bits(_added(old, difference)) != as_bits(new)).sum())
        index = delta.mask[name].long()
        padding = count - index.numel()
        free = torch.arange(count, device="cpu")
        free = free[~torch.isin(free, index, assume_unique=True)][:padding]
        index, order = torch.cat([index, free]).sort()
        # adding -0 leaves every value its bits, -0 too
        difference = torch.cat([difference, torch.full((padding,), -0.0, dtype=dtype, device="cpu")])[order]
        module = _PREFIX + linears[name]
        tensors[f"{module}.shira_weight"] = difference
        tensors[f"{module}.shira_indices"] = torch.stack([index // in_features, index % in_features]).int()
    if inexact:
        total = sum(delta.mask[name].numel() for name in inside)
        warnings.warn(
            f"to_shira: {inexact:,} of {total:,} values are off by a rounding when PEFT adds differences to the base",
            stacklevel=3,
        )
    config: dict[str, Any] = {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",
        "random_seed": 0,
        # one regular expression: as a list, "proj" would also match "block.proj"
        "target_modules": "|".join(re.escape(linears[name]) for name in inside),
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / _CONFIG
    # on leaving, the weights come first: PEFT would take a config and weights that do not fit for an adapter of nothing
    with files.replacing(config_path) as config_file, files.replacing(folder / _WEIGHTS) as weights_file:
        tensor_files.write(weights_file, tensors, {"format": "pt"})
        config_file.write(f"{json.dumps(config, indent=2)}\n".encode())
        for file in (weights_file, config_file):
            file.flush()
        # all is written: what remains are two renames, between which the folder is no adapter
        files.output(config_path).unlink(missing_ok=True)
    rest = SparseMask({n: delta.mask[n] for n in outside}, {n: delta.mask.shapes[n] for n in outside})
    tied = {name: owner for name, owner in delta.tied.items() if owner in outside}
    return Changes(rest, delta.values, originals, tied=tied, numel=delta.numel)


def load(folder: str | os.PathLike[str], base: Model) -> Changes:
    """The changes of a SHiRA adapter on its base: the values that PEFT's `merge_and_unload` would write.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        base: The model the adapter was trained on, or its state dict. Not changed.

    Raises:
        ValueError: Another kind of adapter, a damaged one, or another model.
        OSError: A file of it cannot be read.
    """
    folder = Path(folder)
    try:
        kind = json.loads((folder / _CONFIG).read_bytes()).get("peft_type")
        _, stored = tensor_files.read(folder / _WEIGHTS)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{folder}: expected a SHiRA adapter, got another or damaged files ({error}); get it anew"
        ) from error
    if kind != "SHIRA":
        raise ValueError(f"{folder}: expected an adapter with peft_type 'SHIRA', got {kind!r}; load it with peft")
    modules = {name.rpartition(".")[0] for name in stored}
    wanted = {f"{module}.{part}" for module in modules for part in ("shira_weight", "shira_indices")}
    if odd := sorted(stored.keys() ^ wanted):
        raise ValueError(
            f"{folder}: expected shira_weight and shira_indices per module, got a difference: {listing(odd)}; "
            "modules_to_save are not supported"
        )
    tensors = named_tensors("base", base)
    indices, originals, values, shapes = {}, {}, {}, {}
    for module in sorted(modules):
        name = f"{module.removeprefix(_PREFIX)}.weight"
        if name not in tensors or tensors[name].dim() != 2:
            raise ValueError(f"`base`: expected the adapter's modules, got a model without {name!r}; pass its base")
        shapes[name] = rows, columns = tuple(tensors[name].shape)
        difference, place = stored[f"{module}.shira_weight"], stored[f"{module}.shira_indices"]
        if (
            not (difference.is_floating_point() and tensors[name].is_floating_point())
            or place.dtype not in INDEX_DTYPES
            or place.shape != (2, *difference.shape)
            or difference.dim() != 1
        ):
            got = [f"{short(tensor.dtype)} {tuple(tensor.shape)}" for tensor in (difference, place, tensors[name])]
            raise ValueError(
                f"{folder}: expected floats (n,) and integers (2, n) for float weights, got {got[0]} and {got[1]} for "
                f"{name!r}, {got[2]}; get it anew"
            )
        row, column = place.long()
        if bool(((place < 0).any(0) | (row >= rows) | (column >= columns)).any()):
            raise ValueError(
                f"{folder}: expected row and column within {(rows, columns)} per value of {name!r}, got others: an "
                "adapter for another model; pass its base"
            )
        index, order = (row * columns + column).sort()
        if bool((index[1:] == index[:-1]).any()):
            raise ValueError(f"{folder}: expected each element of {name!r} once, got some twice; get it anew")
        (old,) = ops.gather([tensors[name]], [index.to(tensors[name].device)])
        old = old.cpu()
        new = _added(old, difference[order])
        differs = as_bits(old) != as_bits(new)
        indices[name], originals[name], values[name] = index[differs], old[differs], new[differs]
    kept = [name for name in indices if indices[name].numel()]
    mask = SparseMask({name: indices[name] for name in kept}, {name: shapes[name] for name in kept})
    return Changes(mask, values, originals, numel=sum(tensor.numel() for tensor in tensors.values()))


def _added(original: Tensor, difference: Tensor) -> Tensor:
    """What PEFT computes: the sum in the wider of both dtypes, rounded to the weight's."""
    return (original.to(torch.promote_types(original.dtype, difference.dtype)) + difference).to(original.dtype)


def _linear_weights(model: nn.Module) -> dict[str, str]:
    """Plain names of the weights that PEFT's SHiRA adapts, to the module's name."""
    modules = {}
    for name, module in model.named_modules():
        # the attention reads its projections' weights and would never call the adapter
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and not isinstance(parent, nn.MultiheadAttention):
            modules[f"{name}.weight"] = name
    names = plain_names(list(dict(model.named_parameters(remove_duplicate=False))))
    return {plain: modules[name] for plain, name in names.items() if name in modules}
