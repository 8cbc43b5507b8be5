"""Test the printed plan, and the refusal of a run that will not fit."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from default_settings import optimisation_settings, run_settings

from zerotune.errors import Refused, Unavailable
from zerotune.models.shapes import shape_config
from zerotune.run.plan import GIB
from zerotune.settings.groups import DataSettings, Interval, ModelSettings, TextSettings, TrainSettings
from zerotune.tasks.sst2 import SST2
from zerotune.tasks.texts import load
from zerotune.training import plan
from zerotune.training.classification import LabelledData
from zerotune.training.plan import check_fits, plan_training

EIGHT_H100 = {"plan": True, "devices": 8, "device_memory": 80 * GIB}


def settings(name="Mistral-7B", head="classify", deepspeed=None, run=None, data=None, tokens=8192, **model):
    model = ModelSettings(name, **{"precision": "bf16"} | model)
    optimisation = optimisation_settings(tokens_per_device=tokens)
    chosen = run_settings("run", **run or {})
    text = TextSettings(max_length=128)
    return TrainSettings(
        "sst2", head, model, data or DataSettings(), optimisation, chosen, text=text, deepspeed=deepspeed
    )


def no_data():
    raise Unavailable("org/data is not in the local cache and the hub cannot be reached")


def planned(*args, **kwargs):
    return plan_training(settings(*args, **kwargs), no_data, None)


@pytest.fixture
def command(monkeypatch):
    """Set the plan's command line."""
    words = [
        "train/sst2.py",
        "--plan",
        "--devices",
        "8",
        "--device-memory=80G",
        "--method",
        "full",
        "--epochs",
        "2",
        "--output-dir",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "my runs/a"])


def test_a_gated_model_is_planned_by_its_name_without_data(command):
    found = planned("meta-llama/Llama-3.1-8B", run=EIGHT_H100)
    assert "(the published shape of Llama-3.1-8B; no file of the model was read)" in found
    assert "8,030,261,248" in found and "4,096      32     32         8        128  14,336" in found
    assert "data: not on this machine, so the steps are unknown (org/data" in found
    rows = {line.split()[0]: line.split()[1:] for line in found.splitlines() if line.startswith("  ") and "*" in line}
    assert rows.keys() == {"full", "lora", "qlora"} and rows["qlora"][-1] == "–"
    assert not rows["full"][0].endswith("*") and rows["full"][3].endswith("*"), "16 bytes a weight are 120 GiB"
    plain, zero_1 = (float(cell.rstrip("*")) for cell in rows["lora"][:2])
    assert zero_1 <= plain + 0.8, "ZeRO-1 saves an adapter nothing, and adds its buckets"
    assert found.splitlines()[-2] == (
        "  accelerate launch --num_processes 8 train/sst2.py --epochs 2 --output-dir 'my runs/a' "
        "--method full --deepspeed ds_configs/zero1.json"
    )


def test_a_launch_line_has_no_flags_that_it_refuses(monkeypatch):
    flags = ["--plan", "--devices", "8", "--device-memory", "80G", "--gradient-exchange", "bf16", "--lora-rank", "64"]
    monkeypatch.setattr(sys, "argv", ["train/sst2.py", *flags])
    found = planned("meta-llama/Llama-3.1-8B", run=EIGHT_H100).splitlines()[-2]
    assert found.endswith("train/sst2.py --method full --deepspeed ds_configs/zero1.json")
    for words in (["--model", "Llama-3.1-8B"], ["--model=Llama-3.1-8B"]):  # a name that a plan alone knows
        monkeypatch.setattr(sys, "argv", ["train/sst2.py", *words, *flags])
        line = planned("Llama-3.1-8B", run=EIGHT_H100).splitlines()[-2]
        assert " ".join(words).replace("Llama", "meta-llama/Llama") in line
    monkeypatch.setattr(sys, "argv", ["train/sst2.py", "--plan", "--precision", "fp16"])
    found = planned("meta-llama/Llama-3.1-8B", run=EIGHT_H100, precision="fp16")
    assert "--precision fp16 --method lora" in found and "--deepspeed" not in found, "fp16 is refused under DeepSpeed"


def test_several_nodes_are_planned_for_a_bandwidth(command):
    run = EIGHT_H100 | {"node_bandwidth": 400.0}
    zero_2 = {"deepspeed": {"zero_optimization": {"stage": 2}}, "zero_stage": 2}
    found = planned("Llama-3.2-1B", run=run, tokens=256, **zero_2)
    assert "GB a step (" in found and "of gradients, once)" in found
    lines = found.splitlines()
    start = next(number for number, line in enumerate(lines) if "at 400 Gbit/s a node; 32 rows a step, 8 dev" in line)
    shares = {
        line.split()[0]: [int(cell.rstrip("%")) for cell in line.split()[1:]] for line in lines[start + 2 : start + 6]
    }
    assert shares.keys() == {"plain", "ZeRO-1", "ZeRO-2", "ZeRO-3"}
    assert all(99 > two >= four >= eight > 0 for two, four, eight in shares.values())
    faster = planned("Llama-3.2-1B", run=run | {"node_bandwidth": 1e6}, tokens=256, **zero_2).splitlines()
    assert faster[start + 2].split()[1:] == ["100%"] * 3


def test_a_folder_with_a_config_alone_is_planned(tmp_path, command):
    shape_config("DistilBERT").save_pretrained(tmp_path)
    found = planned(str(tmp_path))
    assert "66,362,880" in found and "shape" not in found and "memory per device" in found


def test_nothing_is_guessed_of_an_unknown_model():
    with pytest.raises(Refused, match=r"a plan also knows, without a file: Llama-3\.2-1B"):
        planned("no/such-model")


@pytest.mark.parametrize("data", [{"train_file": "/no/file.csv"}, {"dataset": "org/data:train"}])
def test_data_that_cannot_be_used_are_refused(data):
    chosen = settings("DistilBERT", data=DataSettings(**data))
    with pytest.raises(Refused, match=r"/no/file\.csv|one split can be evaluated, but not trained on"):
        plan_training(chosen, lambda: load(SST2, chosen.data), None)


def test_batches_that_are_never_packed_are_planned_as_such():
    """--engine trainer pads its rows and computes all layers of all tokens, on any device."""
    config, on_gpu = shape_config("Llama-3.2-1B"), plan.Devices(1, 80 * GIB, True)
    batch = plan.BatchShape(8, 128, 300, is_alone=True)
    loop = settings("Llama-3.2-1B", method="lora")
    trainer = replace(loop, engine="trainer")
    data = LabelledData(["a"], None, np.array([0]), pad_id=0)
    assert plan._as_on_devices(data, loop, config, on_gpu).packs
    assert not plan._as_on_devices(data, trainer, config, on_gpu).packs
    packed, padded = (plan._count(each, config, 2, batch, on_gpu, None) for each in (loop, trainer))
    assert padded.flops > 2 * packed.flops


def test_where_nothing_fits_less_memory_is_tried(command):
    found = planned("Gemma-2-9B", run=EIGHT_H100 | {"devices": 1, "device_memory": 4 * GIB})
    assert "none fits; with --activation-checkpointing --tokens-per-device 2048:" in found
    assert "none fits: use more devices, or a smaller model" in found
    found = planned("Gemma-2-9B", run=EIGHT_H100 | {"devices": 1, "device_memory": 14 * GIB})
    (launch,) = (line for line in found.splitlines() if "python train" in line)
    assert "--method qlora --activation-checkpointing --tokens-per-device 2048" in launch, found
    assert "none fits; with" in found


def rows_of_100_tokens():
    batch = {"input_ids": np.zeros((32, 100)), "attention_mask": np.ones((32, 100))}
    return SimpleNamespace(
        token_ids=np.array([1]),
        pad_id=0,
        lengths=np.full(64, 100),
        micro_batches=lambda rows, budget, devices: [[rows]] * devices,
        num_padded_tokens=lambda rows: 100 * len(rows),
        batch=lambda rows, device: SimpleNamespace(inputs=batch),
    )


@pytest.fixture
def small_gpu(monkeypatch):
    """Pretend to have eight devices of 23.6 GiB."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, int(23.6 * GIB)))
    monkeypatch.setattr("zerotune.models.packed.kernel_works", lambda caps_scores: False)


@pytest.mark.parametrize(
    ("head", "gib", "words"),
    [
        ("generate", 23.6, None),
        ("classify", 23.6, None),
        ("generate", 12, "^will not fit: "),  # training fails; a divided final/ would take 3 GiB
        ("classify", 2, "weights take 3 GiB on each device"),
    ],
)
def test_the_final_evaluation_of_full_tuning_has_to_fit_a_device(head, gib, words, small_gpu, monkeypatch):
    """Mistral-7B under ZeRO-3: a generator is evaluated in bf16; with a head, embedding and norms are in float32.

    If its 14 GiB do not fit one device, each of the eight holds a part of the layers."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, int(gib * GIB)))
    run = settings(
        head=head, deepspeed={"zero_optimization": {"stage": 3}}, zero_stage=3, activation_checkpointing=True
    )
    with pytest.raises(Refused, match=words) if words else nullcontext():
        check_fits(run, shape_config("Mistral-7B"), rows_of_100_tokens(), 2)


def test_a_run_that_will_not_fit_is_refused_before_it_starts(small_gpu):
    with pytest.raises(
        Refused, match=r"will not fit: needs about .* GiB and a device has 23\.6 GiB: use --method lora"
    ):
        check_fits(settings("Llama-3.2-3B"), shape_config("Llama-3.2-3B"), rows_of_100_tokens(), 2)
    check_fits(settings("Llama-3.2-3B", method="qlora"), shape_config("Llama-3.2-3B"), rows_of_100_tokens(), 2)


@pytest.mark.parametrize(("gib", "fits_whole"), [(40, True), (18, False)])
def test_gradients_are_kept_whole_where_they_fit(gib, fits_whole, small_gpu, monkeypatch):
    """Llama-3.2-3B under ZeRO-3 holds 12 GiB of gradients, or an eighth of them."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, gib * GIB))
    zero_3 = {"zero_optimization": {"stage": 3}}
    run = settings("Llama-3.2-3B", deepspeed=zero_3, zero_stage=3, activation_checkpointing=True)
    assert check_fits(run, shape_config("Llama-3.2-3B"), rows_of_100_tokens(), 2) == fits_whole


def test_a_small_model_is_started_without_counting(small_gpu, monkeypatch):
    monkeypatch.delattr(plan, "count_step")
    assert check_fits(settings("DistilBERT"), shape_config("DistilBERT"), rows_of_100_tokens(), 2)


def test_packed_rows_and_questions_with_branches_have_their_shapes():
    columns = {"columns": np.zeros(6)}
    packed = {"input_ids": np.zeros((1, 50)), "bounds": np.array([0, 20, 50]), "longest": 30}
    shape = plan.BatchShape.of(packed, is_alone=True)
    assert (shape.rows, shape.longest, shape.tokens, shape.is_alone) == (2, 30, 50, True)
    written = {"input_ids": np.zeros((3, 8)), "branches": np.zeros((3, 8))} | columns
    shape = plan.BatchShape.of(written, is_alone=False)
    assert (shape.rows, shape.tokens, shape.answers, shape.branches) == (3, 24, 6, True)


@pytest.mark.parametrize(
    ("changes", "deepspeed", "words"),
    [
        ({}, None, "every 10 minutes; a copy of 12.89 GiB in the host memory of a node while one is written"),
        (
            {"checkpoint_every": Interval(steps=500)},
            {"zero_optimization": {"stage": 2}},
            "every 500 steps; a copy of 3.22",
        ),
        ({"scratch_dir": Path("/scratch")}, None, "every 10 minutes, written to /scratch first"),
    ],
)
def test_the_plan_tells_what_a_checkpoint_and_its_copy_take(changes, deepspeed, words, monkeypatch):
    """The model has 1.153 billion float32 weights with two moments; a node has two of the eight processes."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    line = plan._describe_checkpoints(settings(deepspeed=deepspeed, run=changes), 1_153_000_000)
    assert line.startswith(f"checkpoints: up to 12.89 GiB each, {words}")
