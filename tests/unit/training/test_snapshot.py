"""A copy of the state keeps the values of the moment it was taken, even if it is written while the state changes."""

import threading
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import names, newest_after_deaths, record_of
from safetensors.torch import load_file

from zerotune.errors import Refused
from zerotune.training import checkpoints, snapshot
from zerotune.training.background import BackgroundSaves
from zerotune.training.snapshot import HostMemory, StateFile

ALONE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, is_local_main_process=True)


def state(value):
    """Return files with tensors of all kinds, about 10 numbers each, filled with this value."""
    kinds = {"half": torch.bfloat16, "single": torch.float32, "bytes": torch.uint8, "empty": torch.float32}
    weights = {name: torch.full((0 if name == "empty" else 3, 5), value, dtype=kind) for name, kind in kinds.items()}
    moments = {"state": {0: {"step": torch.tensor(float(value)), "list": [torch.full((7,), value), None]}}, "lr": 0.5}
    return [StateFile("model.safetensors", weights, {"step": "3"}), StateFile("optimizer.pt", moments)]


def change(files):
    for tensor in snapshot.tree_leaves([file.content for file in files]):
        if torch.is_tensor(tensor):
            tensor.fill_(99)


def assert_holds(folder, value):
    weights, moments = (file.content for file in state(value))
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.equal(weights[name]) and tensor.dtype == weights[name].dtype
    loaded = torch.load(folder / "optimizer.pt", weights_only=True)
    assert loaded["state"][0]["step"].equal(moments["state"][0]["step"]) and loaded["lr"] == 0.5
    assert loaded["state"][0]["list"][0].equal(moments["state"][0]["list"][0]) and loaded["state"][0]["list"][1] is None


def test_what_is_written_is_the_state_when_it_was_copied(tmp_path):
    at_once, later = tmp_path / "at-once", tmp_path / "later"
    at_once.mkdir()
    later.mkdir()
    files = state(4)
    for file in files:
        file.write(at_once)
    write = HostMemory().begin(files, later, 0)
    change(files)
    entries = write()
    assert_holds(later, 4)
    assert entries == checkpoints.hash_files(later, [later / file.name for file in files])
    # the copies share one block, and torch.save must not write the whole block with each
    sizes = [(folder / "optimizer.pt").stat().st_size for folder in (at_once, later)]
    assert (
        sizes[0] == sizes[1]
        and (at_once / "model.safetensors").read_bytes() == (later / "model.safetensors").read_bytes()
    )


def test_the_memory_is_as_large_as_the_largest_copy_and_is_used_again(tmp_path):
    memory = HostMemory()
    blocks = []
    for files in (state(1)[:1], state(1), state(2)[:1], state(3)):
        memory.begin(files, tmp_path, 0)()
        blocks.append(memory._memory)
    assert blocks[0] is not blocks[1] and blocks[1] is blocks[2] is blocks[3]
    num_bytes = sum(t.nbytes for t in snapshot.tree_leaves([f.content for f in state(3)]) if torch.is_tensor(t))
    assert num_bytes <= len(blocks[1]) <= num_bytes + 6 * 64  # six tensors, each aligned to 64 bytes
    memory.close()
    assert len(memory._memory) == 0


def start(saves, root, step, files=None):
    saves.start(checkpoints.step_folder(root, step), record_of(step), files or state(step), 1000)


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    let_go, write = threading.Event(), snapshot._write
    monkeypatch.setattr(snapshot, "_write", lambda *given: (let_go.wait(30), write(*given))[1])
    saves, files = BackgroundSaves(HostMemory(), 1, ALONE), state(1)
    start(saves, tmp_path, 1, files)
    change(files)
    assert saves.on_its_way == tmp_path / "step-00000001" and not saves.has_arrived
    assert checkpoints.newest_whole(tmp_path) == (None, [])
    let_go.set()
    saves.close()
    assert saves.on_its_way is None and checkpoints.newest_whole(tmp_path) == (tmp_path / "step-00000001", [])
    assert_holds(tmp_path / "step-00000001", 1)


def save_and_leave(root):
    saves = BackgroundSaves(HostMemory(), 1, ALONE)
    start(saves, root, 2)
    saves.close()


def test_after_death_anywhere_the_newest_whole_checkpoint_is_right(tmp_path):
    for _, found, step in newest_after_deaths(tmp_path, save_and_leave):
        if step == 2:
            assert_holds(found, 2)


def test_a_disk_that_fills_in_the_background_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    saves = BackgroundSaves(HostMemory(), 1, ALONE)
    start(saves, tmp_path, 1)
    saves.finish()

    def fill(file, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StateFile, "write", fill)
    start(saves, tmp_path, 2)
    with pytest.raises(Refused, match=r"disk full: .* has .*; a checkpoint takes about 0 MiB"):
        saves.finish()
    assert names(tmp_path) == ["step-00000001"]
