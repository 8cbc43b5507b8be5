"""Test several runs from one command line: their names, their flags, and errors in a sweep's file."""

from pathlib import Path

import pytest

from zerotune.errors import Refused
from zerotune.settings.flags import train_parser
from zerotune.tasks.sst2 import SST2


@pytest.fixture
def sweep(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "rates.txt").write_text(text)
        return str(tmp_path / "rates.txt")

    return write


def runs(*flags):
    return train_parser("", SST2).read(list(flags)).runs


def refusal(*flags) -> str:
    with pytest.raises(Refused) as refused:
        runs(*flags)
    return str(refused.value)


def test_a_single_run_has_none():
    assert runs("--sample") is None and runs("--seed", "1", "--preset", "distilbert-sst2") is None


def test_a_run_for_each_seed():
    planned = runs("--sample", "--seeds", "0", "2", "--plan", "--epochs=1", "--state-file", "x", "--output-dir=runs/s")
    assert planned.folder == Path("runs/s") and planned.plan and planned.seeds == (0, 2) and planned.sweep == {}
    first, second = planned.members
    assert (first.name, second.name) == ("seed-0", "seed-2")
    words = ["--sample", "--epochs=1", "--seed", "2", "--output-dir", "runs/s/seed-2"]
    assert planned.command(second) == words
    assert train_parser("", SST2).read(words).seed == 2
    assert planned.flags["epochs"] == 1 and not {"seed", "output_dir", "preset_line"} & planned.flags.keys()


def test_training_files_are_swept_beside_one_validation_file(sweep):
    planned = runs("--validation-file", "c.csv", "--test-file=d.csv", "--sweep", sweep("--train-file a.csv b.csv\n"))
    assert [one.name for one in planned.members] == ["train_file-a.csv", "train_file-b.csv"]


def test_a_run_for_each_combination_and_seed(sweep):
    path = sweep("# rates\ntrain/sst2.py\n--learning-rate 1e-5 2e-5\n--model org/a /data/b\n")
    planned = runs("--epochs", "2", "--sweep", path, "--seeds", "1", "0", "--launcher", "torchrun --nproc_per_node 2")
    assert planned.launcher == ("torchrun", "--nproc_per_node", "2")
    assert planned.folder == Path("runs/sst2-distilbert-base-uncased-full-sweep-rates")
    assert [one.name for one in planned.members][:3] == [
        "learning_rate-1e-5_model-org-a_seed-1",
        "learning_rate-1e-5_model-org-a_seed-0",
        "learning_rate-1e-5_model-data-b_seed-1",
    ]
    assert len({one.name for one in planned.members}) == 8
    assert planned.sweep == {"learning_rate": ("1e-5", "2e-5"), "model": ("org/a", "/data/b")}
    last = planned.members[-1]
    assert last.setting == {"learning_rate": "2e-5", "model": "/data/b"} and last.seed == 0
    assert planned.command(last) == [
        *("--epochs", "2", "--learning-rate", "2e-5", "--model", "/data/b", "--seed", "0"),
        *("--output-dir", f"{planned.folder}/{last.name}"),
    ]


def test_a_sweeps_values_win_over_those_of_a_preset(sweep):
    planned = runs("--preset", "distilbert-sst2", "--sweep", sweep("--learning-rate 1e-5 2e-5"))
    assert [train_parser("", SST2).read(planned.command(one)).learning_rate for one in planned.members] == [1e-5, 2e-5]


def test_names_that_would_be_the_same_or_too_long_are_told_apart(sweep):
    long = "x" * 300
    names = [one.name for one in runs("--sweep", sweep(f"--model a/b a-b A/B {long}1 {long}2 .. '\u00e9'")).members]
    assert len({name.casefold() for name in names}) == 7 and max(map(len, names)) < 60
    assert all(Path("a", name).parent == Path("a") for name in names)
    many = "\n".join(
        f"--{flag} 0.{'1' * 40} 0.{'2' * 40}" for flag in ("learning-rate", "weight-decay", "warmup-ratio")
    )
    many += "\n--head-learning-rate 1 2\n--lora-dropout 0.123456789012345678901234567890 0.2\n--label-smoothing 0 0.1"
    names = [one.name for one in runs("--sweep", sweep(many)).members]
    assert len(set(names)) == 64 and max(map(len, names)) < 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no flag"),
        ("--learning-rate", "line 1: --learning-rate has no value; wanted two or more"),
        ("--learning-rate 1e-5", "line 1: --learning-rate has one value; wanted two or more"),
        ("--learning-rate 1e-5 0.00001", "line 1: --learning-rate has 0.00001 twice (as 1e-5)"),
        ("--epochs 1 2 2", "line 1: --epochs has 2 twice; name each value once"),
        ("\n--epochs 0 1", "line 2: --epochs must be at least 1, not 0"),
        ("--head classify span", "line 1: --head must be one of classify, generate, not 'span'"),
        ("--lr 1 2", "line 1: train/sst2.py has no flag --lr: did you mean --learning-rate?"),
        ("--epochs 1 2\n--epochs 3 4", "line 2: --epochs is on "),
        ("--seed 1 2", "line 1: --seed cannot be swept: a seed is not a setting to choose"),
        ("--choose-by loss accuracy", "line 1: --choose-by cannot be swept"),
        ("--split-seed 1 2", "line 1: --split-seed cannot be swept: the runs are ranked on the same validation rows"),
        ("--test-file a.csv b.csv", "line 1: --test-file cannot be swept: the runs report on the same test rows"),
        ("--train-file a.csv b.csv", "would be drawn from it; give --validation-file and --test-file on the"),
        ("--activation-checkpointing", "takes no value and cannot be swept"),
        ("--tokens-per-device 512 1024", "--tokens-per-device does not change what a run computes"),
        ("--preset a b", "--preset cannot be swept: give it on the command line, or sweep its flags"),
        ("--sweep a b", "--sweep does not change what a run computes"),
        ("--batch-size 8 16", "line 1: --batch-size is on the command line too"),
        ("train/qa.py\n--epochs 1 2", "line 1: these are flags of train/qa.py"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_lines_number(sweep, text, words):
    line = refusal("--batch-size=4", "--sweep", sweep(text))
    assert words in line and "\n" not in line


@pytest.mark.parametrize(
    ("text", "flags", "flag"),
    [
        ("--head classify generate", [], "--head"),
        ("--epochs 1 2\n--prompt-format chat plain", ["--head", "generate"], "--prompt-format"),
        ("--model a b", ["--head", "generate"], "--model"),
        ("--model a b\n--max-length 64 128", [], None),
    ],
)
def test_losses_of_different_quantities_do_not_choose(sweep, text, flags, flag):
    command = ["--sweep", sweep(text), "--choose-by", "loss", *flags]
    if flag is None:
        train_parser("", SST2).read(command)
    else:
        assert f"{flag} cannot be swept with --choose-by loss" in refusal(*command)


def test_flags_that_do_not_go_with_several_runs(sweep):
    assert refusal("--seeds", "1", "1") == "--seeds has 1 twice: name each seed once"
    assert refusal("--seeds", "1", "--seed", "1") == "--seeds and --seed: leave one out"
    assert "--push-to-hub uploads one run" in refusal("--seeds", "1", "2", "--push-to-hub", "a/b")
    assert "--resume runs/a is for one run" in refusal("--sweep", sweep("--epochs 1 2"), "--resume", "runs/a")
    assert "--launcher starts the runs of --seeds or --sweep" in refusal("--launcher", "torchrun")
    assert "no closing quotation" in refusal("--seeds", "1", "--launcher", "a 'b")
