"""Any number of ranks can read the state that any other number wrote, each element in its place, however it is cut."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zerotune.training.zero_state import KINDS, load_zero_state, zero_state_files

# Two groups of parameters: some smaller than a partition, one cut by many, one of a single element.
GROUPS = ({"layer.weight": (7, 5), "layer.bias": (3,), "scale": (1,)}, {"head.weight": (2, 11)})
STEP = 5.0


def true_values():
    """Return name → kind → the parameter's flattened values, all different."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: shape for group in GROUPS for name, shape in group.items()}
    return {
        name: {kind: torch.rand(math.prod(shape), generator=generator) + 1 for kind in KINDS}
        for name, shape in shapes.items()
    }


def partition_of(parts, start, length):
    """Return `length` elements of the concatenated tensors from `start`, with zeros after the last."""
    flat = torch.cat(parts)
    return torch.cat([flat, flat.new_zeros(start + length)])[start : start + length].clone()


class Rank:
    """One rank's part of a ZeRO optimizer: flat partitions, filled with zeros or the true values."""

    def __init__(self, stage, rank, world, values=None):
        self.stage, self.rank, self.world = stage, rank, world
        self.parameters = {name: nn.Parameter(torch.zeros(shape)) for group in GROUPS for name, shape in group.items()}
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        make = self._cut_each_parameter if stage == 3 else self._cut_each_group
        self.flats = [nn.Parameter(make(group, "weight", values)) for group in GROUPS]
        self.adamw = torch.optim.AdamW(self.flats, fused=True)
        if values:
            for flat, group in zip(self.flats, GROUPS, strict=True):
                moments = {kind: make(group, kind, values) for kind in KINDS[1:]}
                self.adamw.state[flat] = {"step": torch.tensor(STEP), **moments}
        self.calls = []
        self.zero = self._stage_3() if stage == 3 else self._stage_2()

    def _cut_each_group(self, group, kind, values):
        parts = [self._whole(name, kind, values) for name in group]
        length = -(-sum(map(len, parts)) // self.world)
        return partition_of(parts, self.rank * length, length)

    def _cut_each_parameter(self, group, kind, values):
        parts = []
        for name in group:
            whole = self._whole(name, kind, values)
            length = -(-len(whole) // self.world)
            parts.append(partition_of([whole], self.rank * length, length))
        return torch.cat(parts)

    def _whole(self, name, kind, values):
        return values[name][kind] if values else torch.zeros(self.parameters[name].numel())

    def _stage_2(self):
        groups = [[self.parameters[name] for name in group] for group in GROUPS]
        wholes = [torch.zeros(len(flat) * self.world) for flat in self.flats]
        for group, whole in zip(groups, wholes, strict=True):
            first = 0
            for parameter in group:
                parameter.data = whole[first : first + parameter.numel()].view(parameter.shape)
                first += parameter.numel()
        return SimpleNamespace(
            bit16_groups=groups,
            bit16_groups_flat=wholes,
            single_partition_of_fp32_groups=self.flats,
            real_dp_process_group=[self.rank] * len(groups),
            optimizer=self.adamw,
            update_lp_params=lambda: self.calls.append("update"),
        )

    def _stage_3(self):
        for parameter in self.parameters.values():
            parameter.ds_numel, parameter.ds_process_group = parameter.numel(), self.rank
            parameter.ds_tensor = SimpleNamespace(ds_numel=-(-parameter.numel() // self.world))
        return SimpleNamespace(
            fp16_groups=[[self.parameters[name] for name in group] for group in GROUPS],
            fp32_partitioned_groups_flat=self.flats,
            optimizer=self.adamw,
            checkpoint_event_prologue=lambda: self.calls.append("release"),
            _reassign_or_swap_out_partitioned_parameters=lambda number: self.calls.append(number),
            checkpoint_event_epilogue=lambda: self.calls.append("gather"),
        )

    def save(self, folder, weights_alone=False):
        files = zero_state_files(self.zero, self.names, self.rank, self.world, weights_alone)
        return [file.write(folder) for file in files]

    def load(self, folder, weights_alone=False):
        load_zero_state(folder, self.zero, self.names, self.rank, self.world, weights_alone)


@pytest.fixture(autouse=True)
def groups_are_ranks(monkeypatch):
    """Replace process groups by the calling rank."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group)


def save_all(folder, stage, world):
    folder.mkdir()
    return [Rank(stage, rank, world, true_values()).save(folder) for rank in range(world)]


def assert_same_state(rank, expected):
    for ours, theirs in zip(rank.flats, expected.flats, strict=True):
        assert ours.equal(theirs)
        for key, value in expected.adamw.state[theirs].items():
            assert rank.adamw.state[ours][key].equal(value), key


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("saved_by", [1, 2, 3, 8])
def test_every_number_of_ranks_reads_what_every_other_wrote(tmp_path, stage, saved_by):
    save_all(tmp_path / "saved", stage, saved_by)
    for world in (1, 2, 4, 7):
        for number in range(world):
            rank = Rank(stage, number, world)
            rank.load(tmp_path / "saved")
            assert_same_state(rank, Rank(stage, number, world, true_values()))


def test_weights_alone_are_all_that_is_read_for_final(tmp_path):
    (tmp_path / "saved").mkdir()
    for number in range(2):
        rank = Rank(3, number, 2, true_values())
        (file,) = rank.save(tmp_path / "saved", weights_alone=True)
        assert file.name.startswith("weight-")
    rank = Rank(2, 0, 1)
    rank.load(tmp_path / "saved", weights_alone=True)
    for ours, theirs in zip(rank.flats, Rank(2, 0, 1, true_values()).flats, strict=True):
        assert ours.equal(theirs)


def test_stages_read_each_others_files(tmp_path):
    save_all(tmp_path / "saved", 3, 3)
    rank = Rank(2, 1, 2)
    rank.load(tmp_path / "saved")
    assert_same_state(rank, Rank(2, 1, 2, true_values()))


@pytest.mark.parametrize(("stage", "calls"), [(2, ["update"]), (3, ["release", 0, 1, "gather"])])
def test_the_model_gets_the_weights_once_all_are_loaded(tmp_path, stage, calls):
    save_all(tmp_path / "saved", stage, 1)
    rank = Rank(stage, 0, 2)
    rank.load(tmp_path / "saved")
    assert rank.calls == calls


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_alone_are_read_for_final(tmp_path, stage):
    files = save_all(tmp_path / "saved", stage, 2)
    for path in (path for rank in files for path in rank if not path.name.startswith("weight")):
        path.unlink()
    rank = Rank(stage, 0, 1)
    rank.load(tmp_path / "saved", weights_alone=True)
    assert all(ours.equal(true) for ours, true in zip(rank.flats, Rank(stage, 0, 1, true_values()).flats, strict=True))
    assert rank.adamw.state == {}


def test_a_load_replaces_what_was_trained(tmp_path):
    """Existing state is overwritten in place."""
    save_all(tmp_path / "saved", 2, 2)
    rank = Rank(2, 0, 1, true_values())
    moments = [rank.adamw.state[flat]["exp_avg"] for flat in rank.flats]
    with torch.no_grad():
        for tensor in [*rank.flats, *moments]:
            tensor.fill_(-1)
    rank.load(tmp_path / "saved")
    assert_same_state(rank, Rank(2, 0, 1, true_values()))
    assert all(rank.adamw.state[flat]["exp_avg"] is moment for flat, moment in zip(rank.flats, moments, strict=True))


def test_each_rank_writes_files_of_its_own_and_no_element_twice(tmp_path):
    files = save_all(tmp_path / "saved", 3, 3)
    names = [path.name for rank in files for path in rank]
    assert len(set(names)) == 9 and "exp_avg_sq-00003-of-00003.safetensors" in names
    elements = sum(math.prod(shape) for group in GROUPS for shape in group.values())
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for rank in files for path in rank)
    assert sum(path.stat().st_size for rank in files for path in rank) - headers == 4 * len(KINDS) * elements


def test_a_checkpoint_that_lacks_a_ranks_file_is_no_state(tmp_path):
    files = save_all(tmp_path / "saved", 2, 2)
    files[1][2].unlink()
    with pytest.raises(AssertionError, match=r"elements found|other parameters"):
        Rank(2, 0, 1).load(tmp_path / "saved")
