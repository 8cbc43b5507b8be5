"""A rank's checkpoint files, and a copy of them in host memory.

The copy is made between two steps, at the speed of memory; a thread writes it while training continues.
"""

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from zerotune.errors import Refused
from zerotune.files import follow_umask
from zerotune.training import checkpoints

# Alignment of a tensor's first byte, for fast copies.
_ALIGNMENT = 64


@dataclass(frozen=True)
class StateFile:
    """One file of a checkpoint.

    Attributes:
        name: if it ends in `.safetensors`, `content` is a dictionary of tensors, otherwise anything for torch.save.
        metadata: strings for a safetensors file's header.
    """

    name: str
    content: object
    metadata: dict[str, str] | None = None

    def write(self, folder: Path) -> Path:
        """Write the file. Returns its path."""
        from safetensors.torch import save_file

        path = folder / self.name
        if path.suffix == ".safetensors":
            save_file(self.content, path, self.metadata)
            follow_umask(path)
        else:
            with path.open("wb") as file:  # for an open file torch passes on why writing failed
                torch.save(self.content, file)
        return path


def bytes_on_node(num_bytes: int, is_sharded: bool) -> int:
    """Return the bytes of a checkpoint copied on the first node: its ranks' shards, or everything on rank 0."""
    if not is_sharded:
        return num_bytes
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return num_bytes * local // world


class Waiting:
    """Holds no copy: a rank's files are written while training waits."""

    waits = True

    def begin(self, files: list[StateFile], aside: Path, num_bytes: int) -> Callable[[], dict[str, dict]]:
        """Write a rank's files into `aside`, as `HostMemory.begin` does later. Raises Refused if the disk is full."""
        entries = _write(files, None, aside, num_bytes)
        return lambda: entries

    def close(self) -> None:
        """Do nothing."""


class HostMemory:
    """Memory for one copy of a rank's state, as large as the largest copy so far; pinned if the state is on a GPU."""

    waits = False

    def __init__(self):
        self._memory = np.empty(0, np.uint8)

    def begin(self, files: list[StateFile], aside: Path, num_bytes: int) -> Callable[[], dict[str, dict]]:
        """Copy a rank's files to this memory. Returns the function with which a thread writes them into `aside`.

        The previous copy must have been written. A GPU copies after the work already queued, before later steps.

        Args:
            num_bytes: of the checkpoint, for the message if the disk is full.
        """
        tensors = [leaf for file in files for leaf in tree_leaves(file.content) if torch.is_tensor(leaf)]
        places = _places(tensors)
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if places[-1] > len(self._memory):
            self._memory = np.empty(0, np.uint8)  # freed before the larger one is made
            self._memory = _reserve(places[-1], on_gpu)
        starts = iter(places)

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            start = next(starts)
            # each copy has its own storage: torch.save writes the whole storage of a view
            taken = torch.from_numpy(self._memory[start : start + tensor.nbytes])
            return taken.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

        copied = [replace(file, content=tree_map_only(torch.Tensor, copy, file.content)) for file in files]
        event = torch.cuda.Event() if on_gpu else None
        if event:
            event.record()
        return lambda: _write(copied, event, aside, num_bytes)

    def close(self) -> None:
        """Free the memory."""
        self._memory = np.empty(0, np.uint8)


def _places(tensors: list[torch.Tensor]) -> list[int]:
    """Return the first byte of each tensor's copy, and last the total number of bytes."""
    places = [0]
    for tensor in tensors:
        places.append(places[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return places


def _reserve(num_bytes: int, pinned: bool) -> np.ndarray:
    """Allocate memory. PyTorch's own pinned memory comes in powers of two, up to twice the size needed."""
    memory = np.empty(num_bytes, np.uint8)
    if pinned:
        runtime, address = torch.cuda.cudart(), memory.ctypes.data
        # 1: for all devices of this process. Where it fails (WSL, some containers), a copy waits for the GPU
        if int(runtime.cudaHostRegister(address, num_bytes, 1)) == 0:
            weakref.finalize(memory, runtime.cudaHostUnregister, address)
        else:
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda").add_(1)  # CUDA reports the error at the next kernel, here at this one
    return memory


def _write(files: list[StateFile], event: torch.cuda.Event | None, aside: Path, num_bytes: int) -> dict[str, dict]:
    """Write files into a checkpoint's folder, once a GPU has copied them. Returns their manifest entries.

    Raises:
        Refused: the disk is full.
    """
    if event:
        torch.cuda.set_device(event.device)  # a thread begins on the first GPU, and would open a context there
        event.synchronize()
    try:
        return checkpoints.hash_files(aside, [file.write(aside) for file in files])
    except Exception as error:
        raise Refused(checkpoints.full_disk_line(aside.parent, num_bytes, error)) from error
