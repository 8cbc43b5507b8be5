"""Test the meaning of the launcher's environment, and refused launches."""

from types import SimpleNamespace

import pytest
import torch

from zerotune.errors import BrokenMachine, Refused
from zerotune.models.divided import device_bytes
from zerotune.run import launch
from zerotune.run.launch import (
    check_world,
    collective_timeout,
    from_rank_0,
    unseen_gpus_warning,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


# --- what rank 0 does for all ---


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (Refused("no"), Refused),
        (BrokenMachine("a machine"), BrokenMachine),
        (OSError(5, "Input/output error", "a"), BrokenMachine),  # a refusal would end a job for good
    ],
)
def test_an_error_of_rank_0_ends_all_ranks(monkeypatch, error, elsewhere):
    def fail():
        raise error

    shared = []
    monkeypatch.setattr(launch, "on_all_ranks", lambda accelerator, value: shared.append(value) or shared[:1])
    for is_main, kind in ((True, type(error)), (False, elsewhere)):
        monkeypatch.setattr(launch, "is_main_process", lambda is_main=is_main: is_main)
        with pytest.raises(kind) as raised:
            from_rank_0(None, fail)
        assert type(raised.value) is kind and str(raised.value) == str(error)


# --- which processes see each other ---

ACCELERATE_CPU = "python /bin/accelerate launch --cpu --num_processes 2 train/sst2.py --sample"


@pytest.mark.parametrize(
    ("num_processes", "environment", "command"),
    [
        (1, {}, ""),
        (1, {}, "/bin/bash"),
        (1, {}, "python /bin/accelerate launch train/sst2.py --sample"),
        (1, {}, "python /bin/accelerate launch --num_processes 1 train/sst2.py"),
        (1, {"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}, ""),
        (2, {"WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2 train/sst2.py"),
        (2, {"WORLD_SIZE": "2"}, "python /bin/accelerate launch --use_deepspeed --num_processes 2 train/sst2.py"),
        (4, {"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, "accelerate launch --num_processes=4 train/sst2.py"),
    ],
)
def test_launches_in_which_all_see_each_other(num_processes, environment, command):
    check_world(num_processes, environment, command)


@pytest.mark.parametrize(
    ("num_processes", "environment", "command", "words"),
    [
        (1, {"WORLD_SIZE": "2"}, "", "2 processes were launched and this one sees 1: check backend and rendezvous"),
        (2, {"WORLD_SIZE": "4"}, "", "4 processes were launched and this one sees 2"),
        (1, {"SLURM_STEP_NUM_TASKS": "8"}, "", "srun started 8 tasks and each is alone"),
        (1, {}, ACCELERATE_CPU, "asked for 2 processes and started 1: on a CPU use torchrun --nproc_per_node 2"),
        (1, {}, "accelerate launch --num-processes=8 a.py", "asked for 8 processes and started 1"),
    ],
)
def test_launches_in_which_a_process_does_not_see_the_others(num_processes, environment, command, words):
    with pytest.raises(Refused, match=words):
        check_world(num_processes, environment, command)


def test_how_long_a_silent_rank_is_waited_for():
    assert collective_timeout({}).total_seconds() == 7200
    assert collective_timeout({"ZEROTUNE_COLLECTIVE_TIMEOUT": "90"}).total_seconds() == 90
    for wrong in ("0", "-1", "soon", "1.5"):
        with pytest.raises(Refused, match="a whole number of seconds, at least 1"):
            collective_timeout({"ZEROTUNE_COLLECTIVE_TIMEOUT": wrong})


def test_fsdp_is_refused_with_what_to_use_instead(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Refused, match=r"--deepspeed ds_configs/zero3\.json"):
        launch.start_accelerator(None)


@pytest.mark.parametrize(("local_rank", "chosen"), [(None, 0), ("3", 3), ("5", 1)])
def test_a_process_uses_its_own_gpu_from_the_start(monkeypatch, local_rank, chosen):
    """What is tried on a GPU before the process group is joined must not be tried on the first one by all."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    launch.use_own_device(tiny_model=False)
    assert calls == [chosen]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(Refused, match=r"5 processes were launched on .*, and torch sees 4 GPUs there: launch 4"):
        launch.use_own_device(tiny_model=False)


def test_the_processes_of_a_node_judge_by_its_smallest_gpu(monkeypatch):
    sizes = (24, 12, 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=sizes[number]))
    found = []
    for num_processes in ("1", "2", "3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", num_processes)
        found.append(device_bytes())
    assert found == [80, 12, 12]


def test_gpus_that_slurm_gave_and_nobody_sees_are_named():
    line = unseen_gpus_warning({"SLURM_GPUS_ON_NODE": "8"})
    assert line.startswith("WARNING: SLURM gave this job 8 GPUs on ") and "torch sees none" in line
    for environment in ({}, {"SLURM_GPUS_ON_NODE": ""}, {"SLURM_GPUS_ON_NODE": "0"}):
        assert unseen_gpus_warning(environment) is None


def test_products_in_float32_are_not_rounded_to_tf32(monkeypatch):
    """Some images' environments switch TF32 on, and so does Accelerate when it compiles."""

    class CompilingAccelerator:
        num_processes = 1

        def __init__(self, **_):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    monkeypatch.setattr("accelerate.Accelerator", CompilingAccelerator)
    launch.start_accelerator(None)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
