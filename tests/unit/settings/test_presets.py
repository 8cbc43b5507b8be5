"""Test presets: the shipped ones, the user's own files, and errors in a file."""

import pytest

from zerotune.cluster.jobs import PARSERS
from zerotune.errors import Refused
from zerotune.settings.flags import train_parser
from zerotune.settings.resolve import train_settings
from zerotune.settings.train_parser import PRESETS
from zerotune.tasks.sst2 import SST2

SHIPPED = sorted(PRESETS.glob("*.txt"))


def read(*flags, script="train/sst2.py"):
    return PARSERS[script]().read([str(flag) for flag in flags])


def refusal(*flags) -> str:
    with pytest.raises(Refused) as refused:
        read(*flags)
    return str(refused.value)


@pytest.fixture
def preset(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "my.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_preset_names_its_source_and_script_and_is_read_by_its_name(path):
    first, *_ = lines = path.read_text().splitlines()
    assert first.startswith("# ") and any("ublished" in line or "eported" in line for line in lines)
    (script,) = [line for line in lines if line.startswith("train/")]
    flags = read("--preset", path.stem, script=script)
    given = [line.split()[0] for line in lines if line.startswith("--")]
    assert flags.typed == {"preset", *(flag.removeprefix("--").replace("-", "_") for flag in given)}
    assert flags.preset_line.startswith(f"preset {path.stem}: --model {flags.model} ")


def test_the_known_experiments_are_there():
    read_of = {path.stem: path.read_text() for path in SHIPPED}
    assert len(read_of) > 9
    for text in ("sst2.py", "imdb.py", "qa.py", "--engine trainer", "--method qlora", "--head span", "--head generate"):
        assert any(text in each for each in read_of.values()), text


def test_a_flag_wins_over_a_preset_and_both_are_recorded(preset):
    path = preset("--learning-rate 3e-4  # ten times the usual\n\n--epochs 5\n--label-smoothing 0.1\n")
    args = train_parser("", SST2).read(["--epochs", "1", "--sample", "--preset", str(path)])
    assert args.preset_line == f"preset {path}: --learning-rate 3e-4 --label-smoothing 0.1 (and as given: --epochs)"
    settings = train_settings(args, "sst2", {"epochs": 3, "learning_rate": 1e-3})
    assert (settings.optimisation.epochs, settings.optimisation.learning_rate) == (1, 3e-4)
    flags = settings.run.flags
    assert flags.values["preset"] == str(path) and flags.values["label_smoothing"] == 0.1
    assert flags.typed == {"epochs", "sample", "preset", "learning_rate", "label_smoothing"}
    assert not {"preset_line", "runs", "typed"} & flags.values.keys()


def test_windows_files_with_a_byte_order_mark_are_read(preset):
    assert read("--preset", preset(b"\xef\xbb\xbftrain/sst2.py\r\n--epochs 4\r\n")).epochs == 4


def test_a_preset_that_is_not_there_and_one_of_another_script():
    line = refusal("--preset", "distilbert-sst")
    assert line.startswith(
        "no preset 'distilbert-sst': did you mean distilbert-sst2? train/sst2.py has 'distilbert-sst2'"
    )
    assert "imdb" not in line
    line = refusal("--preset", "mistral-qlora-imdb")
    assert line.startswith(
        "the preset mistral-qlora-imdb is for train/imdb.py, and this is train/sst2.py: train/sst2.py"
    )
    with pytest.raises(Refused, match=r"train/classify\.py has none; give a file of your own"):
        read("--preset", "x", script="train/classify.py")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("# only\n", "my.txt holds no flag"),
        ("--sample\n--epohcs 3\n", "my.txt line 2: train/sst2.py has no flag --epohcs: did you mean --epochs?"),
        ("--doc-stride 3", "line 1: train/sst2.py has no flag --doc-stride"),
        ("\n--epochs three", "line 2: --epochs must be a whole number, not 'three'"),
        ("--epochs", "line 1: --epochs needs a value"),
        ("--epochs 1 2", "line 1: '2' belongs to no flag"),
        ("--epochs 1 --seed 2", "line 1: --epochs and --seed; wanted one flag a line"),
        ("--epochs=1", "line 1: '--epochs=1'; write a space"),
        ("--epochs 1\n--epochs 2", "line 2: --epochs is on "),
        ("--preset other", "line 1: --preset is for the command line"),
        ("--seeds 1 2", "line 1: --seeds is for the command line"),
        ("--help", "line 1: --help is for the command line"),
        ("train/qa.py", "line 1: these are flags of train/qa.py, and this is train/sst2.py"),
        ("epochs 3", "line 1: 'epochs 3' is not a flag"),
        ("--model 'a", "line 1: no closing quotation"),
        (b"--epochs 1\n--model \xff", "line 2 is not UTF-8 text"),
        ("--epochs 1".encode("utf-16"), "line 1 is not UTF-8 text"),
        (b"--epochs 1\0", "line 1 holds a NUL character"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_lines_number(preset, content, words):
    line = refusal("--preset", preset(content))
    assert words in line and "\n" not in line


def test_what_is_no_file(tmp_path):
    assert refusal("--preset", tmp_path) == f"{tmp_path} is a folder: name a file"
    assert refusal("--preset", tmp_path / "no.txt") == f"no such file: {tmp_path / 'no.txt'}"
    assert "/dev/zero is not a short file" in refusal("--preset", "/dev/zero")
    assert "too long" in refusal("--preset", "./" + "x" * 300)
    (tmp_path / "secret.txt").write_bytes(b"#" * (2**20 + 1))
    assert "is not a short file" in refusal("--preset", tmp_path / "secret.txt")
