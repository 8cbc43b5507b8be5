"""Test trackers by reading back what TensorBoard and Weights & Biases (offline) have written about a run."""

import json
import struct
from types import SimpleNamespace

import pytest
from default_settings import run_settings

from zerotune.files import write_json
from zerotune.run.folder import RunFolder
from zerotune.run.tracker import grouped, scores
from zerotune.training.progress import Progress

ALONE = SimpleNamespace(num_processes=1, device=SimpleNamespace(type="cpu"))
FLAGS = {"learning_rate": 1e-3, "epochs": 2, "method": "lora", "sample": True, "max_steps": None}
STEP = {"step": 10, "epoch": 0.5, "loss": 0.7, "grad_norm": None, "tokens": 99}
EVALUATION = {"step": 20, "epoch": 1.0, "train_loss": 0.6, "eval_loss": 0.5, "eval_accuracy": 0.75}
METRICS = {"task": "sst2", "num_items": 8, "accuracy": 0.875, "accuracy_ci95": [0.5, 0.98], "threshold": 0.5}
WRITTEN = {
    "train/loss": (10, 0.7),
    "train/epoch": (10, 0.5),
    "train/tokens": (10, 99),
    "train/mean_loss": (20, 0.6),
    "validation/loss": (20, 0.5),
    "validation/accuracy": (20, 0.75),
    "base/accuracy": (0, 0.875),
    "test/accuracy": (20, 0.875),
}


def test_names_are_grouped_and_scores_are_what_has_an_interval():
    assert grouped(STEP) == {"train/epoch": 0.5, "train/loss": 0.7, "train/tokens": 99}
    evaluated = {"train/mean_loss": 0.6, "validation/loss": 0.5, "validation/accuracy": 0.75}
    assert grouped(EVALUATION) == evaluated
    assert scores(METRICS, "test") == {"test/accuracy": 0.875}


def track(folder, kind):
    """Track a short run in two starts, as if it had been interrupted."""
    settings = run_settings(folder, FLAGS, tracker=kind)
    with RunFolder(settings, ALONE) as run:
        run.update_json("run.json", flags=FLAGS, run_id=run.run_id)
        run.start_tracker()
        run.log(STEP)
    with RunFolder(settings, ALONE) as run:
        run.start_tracker()
        run.log(EVALUATION)
        for name in ("base", "final"):
            (folder / "eval" / name).mkdir(parents=True)
            write_json(folder / "eval" / name / "metrics.json", METRICS)
        run.note_training_start()
        run.finish(Progress(step=20), lambda: folder / "report.html")


def test_tensorboard(tmp_path):
    track(tmp_path / "run", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = tmp_path / "run" / "tensorboard"
    assert not [path for path in folder.iterdir() if path.is_dir()]  # no second run for the flags
    events = EventAccumulator(str(folder)).Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {name: [(step, pytest.approx(value))] for name, (step, value) in WRITTEN.items()}
    metadata = events.SummaryMetadata(SESSION_START_INFO_TAG)
    flags = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert flags["learning_rate"].number_value == 1e-3 and flags["method"].string_value == "lora"
    assert flags["sample"].number_value == 1 and flags["max_steps"].string_value == "None"


def wandb_records(content):
    """Yield the records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    at, record = 7, b""
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:  # a block's end too short for a header is filler
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(tmp_path / "run", "wandb")
    from wandb.proto import wandb_internal_pb2

    found, flags = {}, {}
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            for item in record.config.update:
                flags[item.key] = json.loads(item.value_json)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found |= {name: (row["_step"], value) for name, value in row.items() if "/" in name}
    written = WRITTEN | {"base/accuracy": WRITTEN["test/accuracy"]}  # no step before the last one
    assert found == {name: (step, pytest.approx(value)) for name, (step, value) in written.items()}
    assert flags == FLAGS
