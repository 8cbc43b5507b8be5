"""Test turning flags into settings: defaults are filled in once, typed flags remembered, nothing modified."""

import copy
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from zerotune.errors import Refused
from zerotune.settings.flags import eval_parser, train_parser
from zerotune.settings.groups import Interval
from zerotune.settings.resolve import eval_settings, train_settings
from zerotune.tasks.classify import OWN
from zerotune.tasks.sst2 import SST2

SAMPLE = {"epochs": 5, "learning_rate": 1e-3}


def resolve(*flags):
    return train_settings(train_parser("", SST2).parse_args(flags), "sst2", SAMPLE)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "m"], (3, 2e-5, 1e-4)),
        (["--model", "m", "--method", "lora"], (3, 2e-4, 1e-3)),
        (["--model", "m", "--learning-rate", "1e-5"], (3, 1e-5, 5e-5)),
        (["--model", "m", "--head-learning-rate", "0"], (3, 2e-5, 0.0)),
        (["--model", "m", "--head", "generate"], (3, 2e-5, None)),
        (["--sample"], (5, 1e-3, 5e-3)),
        (["--sample", "--epochs", "2"], (2, 1e-3, 5e-3)),
        (["--sample", "--model", "m"], (3, 2e-5, 1e-4)),
    ],
)
def test_rates_and_epochs_follow_from_method_head_and_sample(flags, expected):
    found = resolve(*flags).optimisation
    assert (found.epochs, found.learning_rate, found.head_learning_rate) == pytest.approx(expected)


def test_a_run_given_as_model_is_its_final(tmp_path):
    (tmp_path / "a" / "final").mkdir(parents=True)
    (tmp_path / "a" / "run.json").write_text("{}")
    settings = resolve("--model", str(tmp_path / "a"))
    assert settings.model.name == str(tmp_path / "a" / "final")
    assert settings.run.output_dir == Path("runs/sst2-a-full")
    (tmp_path / "a" / "final").rmdir()
    with pytest.raises(Refused, match="has no final/ yet"):
        resolve("--model", str(tmp_path / "a"))


@pytest.mark.parametrize("flag", ["--lora-rank", "--lora-alpha"])
def test_flags_about_adapters_need_adapters(flag):
    with pytest.raises(Refused, match=f"{flag} is for --method lora or qlora, and --method is full: add --method"):
        resolve("--model", "m", flag, "16")
    for method in ("qlora", "full"):  # a sweep may have both methods, and a preset may have the flag
        assert resolve("--model", "m", flag, "16", "--method", method).model.method == method


def test_flags_are_recorded_as_plain_values_with_those_that_were_typed():
    flags = resolve("--model", "org/m", "--seed", "0", "--output-dir", "runs/a").run.flags
    assert flags.typed == {"model", "seed", "output_dir"}
    assert flags.values["output_dir"] == "runs/a" and flags.values["head_learning_rate"] == pytest.approx(1e-4)
    assert flags.values["epochs"] == 3 and "typed" not in flags.values


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (None, Interval(minutes=10)),
        ("500", Interval(steps=500)),
        ("10m", Interval(minutes=10)),
        ("0.5m", Interval(minutes=0.5)),
    ],
)
def test_checkpoints_are_so_many_steps_or_minutes_apart(flag, expected):
    run = resolve("--model", "m", *(["--checkpoint-every", flag] if flag else [])).run
    assert run.checkpoint_every == expected and run.flags.values["checkpoint_every"] == (flag or "10m")


@pytest.mark.parametrize("flag", ["0", "-5", "1.5", "0m", "-1m", "m", "infm", "nanm", "10 min", "10h", ""])
def test_no_other_interval_is_accepted(flag, capsys):
    with pytest.raises((SystemExit, Refused)):
        resolve("--model", "m", f"--checkpoint-every={flag}")
    print(capsys.readouterr().err)


def test_the_run_folder_is_named_after_task_model_method_and_head():
    assert resolve("--model", "org/M").run.output_dir == Path("runs/sst2-m-full")
    assert resolve("--model", "org/M", "--head", "generate").run.output_dir == Path("runs/sst2-m-full-generate")


def test_resolving_changes_no_flag_and_settings_are_frozen():
    args = train_parser("", SST2).parse_args(["--model", "m", "--train-file", "a.tsv"])
    before = copy.deepcopy(vars(args))
    settings = train_settings(args, "sst2", SAMPLE)
    assert vars(args) == before
    assert settings.data.train_file == str(Path("a.tsv").absolute()) and settings.data.test_file is None
    with pytest.raises(FrozenInstanceError):
        settings.model.name = "other"


def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path, monkeypatch):
    """Requeued to another kind of device, whose own choice would be another one."""
    monkeypatch.setattr("zerotune.settings.precision.default_precision", lambda: "bf16")

    def chosen(*flags):
        parser = train_parser("", SST2)
        return train_settings(parser.read(["--output-dir", str(tmp_path), *flags]), "sst2", {}).model.precision

    assert chosen() == "bf16"
    for content, found in (('{"identity": {"precision": "fp32"}}', "fp32"), ('{"identity": 3}', "bf16"), ("{", "bf16")):
        (tmp_path / "run.json").write_text(content)
        assert chosen() == found
        assert chosen("--precision", "fp16") == "fp16"


def test_a_train_file_names_no_items_of_an_evaluation():
    def evaluated(*flags, task=SST2):
        return eval_settings(eval_parser("", task).parse_args(["--model", "m", *flags]), task.name)

    for task in (SST2, OWN):
        with pytest.raises(Refused, match=r"--train-file a\.csv gives the shots .*, and --shots is 0: name the items"):
            evaluated("--train-file", "a.csv", task=task)
    for more in (["--shots", "4"], ["--shots", "0"], ["--split", "80-20"], ["--test-file", "b.csv"]):
        assert evaluated("--train-file", "a.csv", *more).data.train_file.endswith("a.csv")


def test_an_evaluation_in_four_bits_is_qlora():
    args = eval_parser("", SST2).parse_args(["--model", "m", "--load-4bit", "--shots", "4", "--prompt-format", "chat"])
    settings = eval_settings(args, "sst2")
    assert (settings.model.method, settings.prompt.shots, settings.prompt.format) == ("qlora", 4, "chat")
    assert settings.run.output_dir == Path("runs/eval-sst2-m") and settings.text.max_length is None
    with pytest.raises(Refused, match=r"^--model is missing"):  # no default: DistilBERT cannot answer
        eval_settings(eval_parser("", SST2).parse_args([]), "sst2")
    sample = eval_settings(eval_parser("", SST2).parse_args(["--sample"]), "sst2")
    assert sample.model.name.endswith("sample-llama")


def test_a_plan_for_gpus_computes_as_they_do():
    found = resolve("--model", "m", "--plan", "--devices", "8", "--device-memory", "80G")
    assert found.run.device_memory == 80 * 2**30 and found.run.devices == 8
    assert (found.model.precision, found.optimisation.tokens_per_device) == ("bf16", 8192)
    with pytest.raises(Refused, match="add --plan"):
        resolve("--model", "m", "--devices", "8")
