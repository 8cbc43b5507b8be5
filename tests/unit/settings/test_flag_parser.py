"""A wrong flag is refused in one line that gives the expected and the found value."""

import subprocess
import sys

import pytest

from zerotune.errors import Refused
from zerotune.prediction.settings import predict_parser
from zerotune.settings.flags import publish_parser, train_parser
from zerotune.settings.groups import Interval
from zerotune.tasks.sst2 import SST2


def refusal(*flags, parser=None):
    with pytest.raises(Refused) as refused:
        (parser or train_parser("", SST2)).read(flags)
    return str(refused.value)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--ephocs", "3"], "unknown flag --ephocs: did you mean --epochs?"),
        (["--ephocs=3"], "unknown flag --ephocs: did you mean --epochs?"),
        (["--batch_size", "3"], "unknown flag --batch_size: did you mean --batch-size?"),
        (["--epoch", "3"], "unknown flag --epoch: did you mean --epochs?"),
        (["--num_train_epochs", "3"], "unknown flag --num_train_epochs: did you mean --epochs?"),
        (["--lr", "3"], "unknown flag --lr: did you mean --learning-rate?"),
        (["--output", "a"], "unknown flag --output: did you mean --output-dir?"),
        (["-epochs", "3"], "unknown flag -epochs: did you mean --epochs?"),
        (["--qqq"], "unknown flag --qqq; --help lists all"),
        (["reviews.csv"], "'reviews.csv' belongs to no flag; --help lists the flags"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--epochs", "-1"], "--epochs must be at least 1, not -1"),
        (["--epochs", "three"], "--epochs must be a whole number, not 'three'"),
        (["--epochs", "1.5"], "--epochs must be a whole number, not '1.5'"),
        (["--epochs"], "--epochs needs a value"),
        (["--epochs", "--sample"], "--epochs needs a value"),
        (["--sample=yes"], "--sample takes no value, but was given 'yes'"),
        (["--seed", str(2**63)], f"--seed must fit 64 bits, which {2**63} does not"),
        (["--learning-rate", "nan"], "--learning-rate must be a finite number of at least 0, not nan"),
        (["--learning-rate", "fast"], "--learning-rate must be a number, not 'fast'"),
        (["--warmup-ratio", "6"], "--warmup-ratio must be from 0 to 1, not 6"),
        (["--label-smoothing", "1"], "--label-smoothing must be from 0 to below 1, not 1"),
        (["--max-grad-norm", "0"], "--max-grad-norm must be a number above 0, or none, not 0"),
        (["--max-grad-norm", "off"], "--max-grad-norm must be a number above 0, or none, not 'off'"),
        (["--model", ""], "--model is empty: is a shell variable unset?"),
        (["--method", "Lora"], "--method must be one of full, lora, qlora, not 'Lora': did you mean lora?"),
        (["--method", "8bit"], "--method must be one of full, lora, qlora, not '8bit'"),
        (
            ["--checkpoint-every", "10s"],
            "--checkpoint-every must be steps, such as 500, or minutes, such as 10m, not '10s'",
        ),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, not 0"),
        (
            ["--checkpoint-every", "1.5"],
            "--checkpoint-every must be steps, such as 500, or minutes, such as 10m, not '1.5'",
        ),
    ],
)
def test_one_line_with_the_rule_the_value_and_the_way_out(flags, line):
    assert refusal(*flags) == line


def test_what_is_missing():
    assert refusal("runs/a", "--merg", "x", parser=publish_parser("")) == "unknown flag --merg: did you mean --merge?"
    assert refusal(parser=publish_parser("")) == "RUN is missing"
    assert refusal("--labels", parser=predict_parser("")) == "--labels needs at least one value"


def test_texts_that_look_like_flags_may_follow_two_dashes():
    parsed = predict_parser("").read(["--model", "m", "--", "--ephocs"])
    assert parsed.texts == ["--ephocs"] and parsed.typed == {"model", "texts"}


def test_right_values_and_what_was_typed():
    parsed = train_parser("", SST2).read(["--checkpoint-every", "0.5m", "--max-grad-norm", "none", "--epochs", "3"])
    assert parsed.checkpoint_every == Interval(minutes=0.5) and parsed.max_grad_norm is None
    assert parsed.typed == {"checkpoint_every", "max_grad_norm", "epochs"}


def test_a_script_prints_this_line_alone():
    ended = subprocess.run(
        [sys.executable, "train/sst2.py", "--ephocs", "3"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "refused: unknown flag --ephocs: did you mean --epochs?\n"


def test_no_flag_may_be_abbreviated_since_a_later_version_may_have_another_that_begins_so():
    assert refusal("--warmup", "0.1") == "unknown flag --warmup: did you mean --warmup-ratio?"
