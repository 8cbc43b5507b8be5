"""Weights and AdamW moments of a ZeRO run on disk, by parameter and range, for any number of processes to load.

weight-00001-of-00004.safetensors   exp_avg-…   exp_avg_sq-…   the shards of the first of four ranks, in float32

The tensor "4096:model.score.weight" holds elements 4096, 4097, … of the flattened parameter. A loading rank reads only
its own ranges, from whichever files hold them. DeepSpeed's own files would need a conversion for each number of
processes, and hold the weights twice.

bitsandbytes quantises moments in blocks of a rank's partition. They are in state-00001-of-00004.pt, and only the same
number of ranks can load them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from zerotune.training.snapshot import StateFile

KINDS = ("weight", "exp_avg", "exp_avg_sq")
BYTES_A_WEIGHT = 4 * len(KINDS)


class Shard(NamedTuple):
    """A range of one flattened parameter that this rank keeps, and its offset in one of the rank's flat partitions."""

    parameter: nn.Parameter
    start: int  # in the parameter
    offset: int  # in the partition
    length: int


def zero_state_files(
    zero, names: dict[nn.Parameter, str], rank: int, world_size: int, weights_alone: bool = False
) -> list[StateFile]:
    """Return the files of the weights and moments that this rank keeps.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of stage 1, 2 or 3.
        names: of the trainable parameters.
        weights_alone: leave out the optimizer's state.
    """
    partitions = list(_partitions(zero))
    files, metadata = [], None
    kinds = KINDS[:1] if weights_alone else _kinds(zero.optimizer)
    if _moves(zero.optimizer) and not weights_alone:
        steps = {float(_state(zero.optimizer, flat)["step"]) for flat, _ in partitions}
        assert len(steps) == 1, f"AdamW has made {sorted(steps)} steps: one number is kept for all weights"
        metadata = {"step": str(steps.pop())}
    for kind in kinds:  # a file each: written straight from a GPU, only one kind at a time is in host memory
        tensors = {
            f"{shard.start}:{names[shard.parameter]}": _values(zero.optimizer, flat, kind, shard)
            for flat, shards in partitions
            for shard in shards
        }
        files.append(StateFile(f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors", tensors, metadata))
    if not (weights_alone or _moves(zero.optimizer)):
        states = [zero.optimizer.state[flat] for flat, _ in partitions]
        files.append(StateFile(_quantised_name(rank, world_size), states))
    return files


def load_zero_state(
    folder: Path, zero, names: dict[nn.Parameter, str], rank: int, world_size: int, weights_alone: bool = False
) -> None:
    """Restore the state in `zero_state_files`, bit for bit, on any number of ranks; all ranks take part.

    Quantised moments need the number of ranks that wrote them.

    Args:
        weights_alone: leave the optimizer's state as it is.
    """
    if hasattr(zero, "checkpoint_event_prologue"):  # stage 3: releases gathered parameters
        zero.checkpoint_event_prologue()
    for kind in KINDS[:1] if weights_alone else _kinds(zero.optimizer):
        pieces, step = _open_pieces(folder, kind)
        assert pieces.keys() == set(names.values()), f"{folder} holds other parameters"
        for flat, shards in _partitions(zero):
            if step is not None and not weights_alone:
                _state(zero.optimizer, flat)["step"].fill_(step)
            for shard in shards:
                _read(pieces[names[shard.parameter]], shard.start, _values(zero.optimizer, flat, kind, shard))
    if not (weights_alone or _moves(zero.optimizer)):
        states = torch.load(folder / _quantised_name(rank, world_size), map_location="cpu", weights_only=True)
        for (flat, _), state in zip(_partitions(zero), states, strict=True):
            zero.optimizer.state[flat] = {
                key: value.to(flat.device) if torch.is_tensor(value) else value for key, value in state.items()
            }
    _spread_weights(zero)


def _moves(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the state is float32 numbers per weight, which any number of ranks can load."""
    return isinstance(optimizer, torch.optim.AdamW)


def _kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return KINDS if _moves(optimizer) else KINDS[:1]


def _quantised_name(rank: int, world_size: int) -> str:
    return f"state-{rank + 1:05d}-of-{world_size:05d}.pt"


def _spread_weights(zero) -> None:
    """Copy each rank's float32 weights to the weights that the model computes with."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    zero.checkpoint_event_epilogue()


def _partitions(zero) -> Iterator[tuple[torch.Tensor, list[Shard]]]:
    """Yield this rank's flat partitions, which are AdamW's parameters, and the shards in each."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            yield flat, _shards_of_stage_3(group)
        return
    groups = (zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups)
    for number, (group, whole, flat) in enumerate(zip(*groups, strict=True)):
        first = torch.distributed.get_rank(zero.real_dp_process_group[number]) * flat.numel()
        yield flat, _shards_of_stage_2(group, whole, range(first, first + flat.numel()))


def _shards_of_stage_2(group: list[nn.Parameter], whole: torch.Tensor, kept: range) -> list[Shard]:
    """Return this rank's shards in stages 1 and 2: they cut a flat tensor of all parameters into equal parts."""
    shards = []
    for parameter in group:
        assert parameter.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), "a view of its group"
        first = parameter.storage_offset() - whole.storage_offset()
        start, stop = max(first, kept.start), min(first + parameter.numel(), kept.stop)
        if start < stop:
            shards.append(Shard(parameter, start - first, start - kept.start, stop - start))
    return shards


def _shards_of_stage_3(group: list[nn.Parameter]) -> list[Shard]:
    """Return this rank's shards in stage 3: it cuts each parameter into equal parts, the last ones padded."""
    shards, offset = [], 0
    for parameter in group:
        padded = parameter.ds_tensor.ds_numel
        start = torch.distributed.get_rank(parameter.ds_process_group) * padded
        length = min(padded, parameter.ds_numel - start)
        if length > 0:
            shards.append(Shard(parameter, start, offset, length))
        offset += padded
    return shards


def _state(adamw: torch.optim.AdamW, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return AdamW's state of a partition; create it if AdamW has not taken a step yet."""
    state = adamw.state[flat]
    if not state:
        step_device = flat.device if adamw.defaults["fused"] else "cpu"
        state["step"] = torch.zeros((), device=step_device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    return state


def _values(adamw: torch.optim.AdamW, flat: torch.Tensor, kind: str, shard: Shard) -> torch.Tensor:
    whole = flat if kind == "weight" else _state(adamw, flat)[kind]
    return whole.detach().narrow(0, shard.offset, shard.length)


def _open_pieces(folder: Path, kind: str) -> tuple[dict[str, dict[int, object]], float | None]:
    """Open the pieces of all ranks: name → first element → slice of a file. Also returns AdamW's step or None."""
    from safetensors import safe_open

    pieces: dict[str, dict[int, object]] = {}
    steps = set()
    for path in folder.glob(f"{kind}-*-of-*.safetensors"):
        file = safe_open(path, "pt")
        steps.add((file.metadata() or {}).get("step"))
        for key in sorted(file.keys()):
            start, name = key.split(":", 1)
            pieces.setdefault(name, {})[int(start)] = file.get_slice(key)
    (step,) = steps
    return pieces, None if step is None else float(step)


def _read(pieces: dict[int, object], start: int, values: torch.Tensor) -> None:
    """Copy elements [start, start + length) of a parameter into `values` [length]; only these are read."""
    num_read, stop = 0, start + len(values)
    for first, piece in pieces.items():
        low, high = max(start, first), min(stop, first + piece.get_shape()[0])
        if low < high:
            values[low - start : high - start].copy_(piece[low - first : high - first])
            num_read += high - low
    assert num_read == len(values), f"{num_read} of {len(values)} elements found"
