"""Plan a run with each shipped preset: its flags are compatible, and a run of a small model accepts them."""

import pytest

from zerotune.settings.train_parser import PRESETS


def script_of(path) -> str:
    return next(line for line in path.read_text().splitlines() if line.startswith("train/"))


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.txt")), ids=lambda path: path.stem)
def test_a_preset_is_planned(path, workplace):
    folder = workplace.folder / f"preset-{path.stem}"
    flags = ["--preset", path.stem, "--plan", "--output-dir", folder]
    if script_of(path) == "train/qa.py":
        flags += ["--sample", "--model", workplace.model, "--max-length", 256]
    else:
        flags += ["--model", workplace.model, "--train-file", workplace.train_file, "--max-length", 128]
        flags += ["--train-size", 40, "--validation-size", 20, "--test-size", 20]
    plan = workplace.server.start(script_of(path), flags, folder).wait()
    assert plan.codes == (0,), plan.text()
    first, *rest = plan.text().splitlines()
    assert first.startswith(f"preset {path.stem}: --") and any(line.startswith("trainable") for line in rest)
    assert not folder.exists()
