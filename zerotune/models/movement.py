"""How far training moved a model's weights: final/ against the checkpoint that it was tuned from, tensor by tensor.

For a whole model the change is the difference of the two checkpoints. For an adapter it is its product, scale · B · A
(Hu et al. 2021, equation 3), whose norm follows from two small matrices: |BA|² is the sum over (BᵀB) ∘ (AAᵀ), so that
B · A is never formed.
"""

import math
import os
import re
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import torch

from zerotune.files import read_json
from zerotune.models.model_files import WeightIndex, cached_snapshot
from zerotune.models.parameters import module_group
from zerotune.models.pretrained import read_config

# Weights in a block of rows, by which matrices are compared: 256 MiB in float32.
BLOCK = 1 << 26
_LAYER = re.compile(r"\.(?:layers?|h|blocks)\.(\d+)\.")


def weight_movement(final: Path, base: str, revision: str | None) -> dict:
    """Return parameters.json's entry "moved": how far training moved the weights, relative to the base's.

    Reads both checkpoints once and holds one block of a weight at a time. The head is left out: it is new.

    Args:
        base: the model that was tuned, a folder or a hub id whose files are cached.
    Returns:
        {"groups": {module group: |change| / |weights before|}, "layers": the same by layer, [num_layers]}, Frobenius
        norms over all weights of a group; or {"reason": why it is not known}.
    """
    from safetensors import SafetensorError

    try:
        with ExitStack() as stack:
            return _movement(final, _open_weights(base, revision, stack), stack)
    except (OSError, SafetensorError, AssertionError, KeyError, ValueError) as error:
        return {"reason": f"the weights of {base} and final/ could not be compared ({error})"}


def _movement(final: Path, before: dict, stack: ExitStack) -> dict:
    if not before:
        return {"reason": "the model that was tuned has no weights in safetensors here"}
    adapter = (final / "adapter_config.json").is_file()
    after = _open_file(final / "adapter_model.safetensors", stack) if adapter else _open_weights(final, None, stack)
    changes = _adapter_changes(final, after, before) if adapter else _whole_changes(after, before)
    config, groups, layers = read_config(str(final), None), defaultdict(lambda: [0.0, 0.0]), {}
    for name, change, norm in changes:
        group = module_group(name, config)
        if group == "head":
            continue
        places = [groups[group]]
        if layer := _LAYER.search(f".{name}"):
            places.append(layers.setdefault(int(layer[1]), [0.0, 0.0]))
        for place in places:
            place[0] += change
            place[1] += norm
    if not groups:
        return {"reason": "the weights of the model that was tuned have other names than those of final/"}
    return {
        "groups": {group: _relative(*groups[group]) for group in groups},
        "layers": [_relative(*layers[layer]) for layer in sorted(layers)],
    }


def _relative(change: float, norm: float) -> float:
    return math.sqrt(change / norm) if norm else 0.0


def _open_weights(name: str | Path, revision: str | None, stack: ExitStack) -> dict:
    """Return the open safetensors file of each weight of a whole model, by its name; {} where there is none."""
    folder = Path(name) if os.path.isdir(name) else cached_snapshot(str(name), revision)
    if folder is None:
        return {}
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"} if not index.exists() else set(read_json(index, WeightIndex)["weight_map"].values())
    opened = [_open_file(folder / file, stack) for file in sorted(files) if (folder / file).exists()]
    return {name: file for weights in opened for name, file in weights.items()}


def _open_file(path: Path, stack: ExitStack) -> dict:
    from safetensors import safe_open

    file = stack.enter_context(safe_open(path, "pt"))
    return dict.fromkeys(file.keys(), file)


def _whole_changes(after: dict, before: dict):
    """Yield (name, squared norm of the change, squared norm before) of each weight that both have."""
    earlier_name = _Names(before)
    for name, file in after.items():
        earlier = earlier_name.find(name)
        if earlier is not None:
            yield name, *_squares(file.get_slice(name), before[earlier].get_slice(earlier))


def _adapter_changes(final: Path, after: dict, before: dict):
    """Yield the same for each matrix that an adapter changes."""
    config, earlier_name = read_json(final / "adapter_config.json"), _Names(before)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for name in after:
        if not name.endswith(".lora_A.weight"):
            continue
        a, b = (after[each].get_tensor(each).double() for each in (name, name.replace(".lora_A.", ".lora_B.")))
        change = scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
        matrix = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        earlier = earlier_name.find(matrix)
        if earlier is not None:
            yield matrix, change, _squares(before[earlier].get_slice(earlier), None)[1]


class _Names:
    """Finds a checkpoint's weights by the names of another class, whose prefix differs."""

    def __init__(self, names):
        self.names = set(names)
        self.by_end = {name.partition(".")[2]: name for name in names}
        self.by_end |= {name.partition(".language_model.")[2]: name for name in names if ".language_model." in name}

    def find(self, name: str) -> str | None:
        end = name.partition(".")[2]
        found = (self.by_end.get(name), end if end in self.names else None, self.by_end.get(end))
        # without its prefix, score.weight would be just "weight", which could be any weight
        return name if name in self.names else next((each for each in found if each and "." in end), None)


def _squares(tuned, before) -> tuple[float, float]:
    """Return the squared norms of a weight's change and of the weight before it, by blocks of rows.

    Args:
        tuned, before: slices of an open file, of the same shape. If `before` is None, the norm is that of `tuned` and
            the change 0.
    """
    shape = tuned.get_shape()
    assert before is None or before.get_shape() == shape, f"a weight is {before.get_shape()}, and was {shape}"
    if not shape:
        return 0.0, 0.0
    rows, change, norm = max(1, BLOCK // max(1, math.prod(shape[1:]))), 0.0, 0.0
    for start in range(0, shape[0], rows):
        block = tuned[start : start + rows].float()
        earlier = block if before is None else before[start : start + rows].float()
        norm += float(torch.linalg.vector_norm(earlier)) ** 2
        change += 0.0 if before is None else float(torch.linalg.vector_norm(block - earlier)) ** 2
    return change, norm
