"""Run docs/own-data.md from its first line to its last, in an otherwise empty folder, with a tiny model."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from launching import REPOSITORY

PAGE = (REPOSITORY / "docs" / "own-data.md").read_text()
# Its data is not available here; tests/unit/tasks/test_classify.py tests GLUE's tasks.
NEEDS_NETWORK = "--glue"
FEW = [
    "--max-steps",
    "40",
    "--learning-rate",
    "2e-3",
    "--precision",
    "fp32",
    "--limit-eval",
    "60",
    "--base-eval",
    "none",
]


def commands():
    lines = re.findall(r"^    ((?:accelerate launch|python) .*)$", PAGE, re.MULTILINE)
    return [shlex.split(line) for line in lines if NEEDS_NETWORK not in line]


@pytest.mark.slow
def test_the_page_from_a_csv_to_a_merged_model(workplace, tmp_path):
    """Run each command as written, except for a tiny model and few steps."""
    writing, loading = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    alone = workplace.environment | {"PYTHONPATH": str(REPOSITORY)}

    def run(code):
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=tmp_path, env=alone, text=True, capture_output=True, timeout=600)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    run(writing)
    (tmp_path / "new.txt").write_text("the parcel is late\nI was charged twice\n")
    shutil.copytree(workplace.model, tmp_path / "tiny")
    printed = {}
    for words in commands():
        place = next(place for place, word in enumerate(words) if word.endswith(".py"))
        script, flags = words[place], words[place + 1 :]
        if "meta-llama/Llama-3.2-1B" in flags:
            flags[flags.index("meta-llama/Llama-3.2-1B")] = "tiny"
        elif script == "train/classify.py" and "--sample" not in flags:
            flags += ["--model", "tiny"]
        flags += FEW if script.startswith("train/") else []
        log = tmp_path / f"command-{len(printed)}"
        ended = workplace.server.start(str(REPOSITORY / script), flags, log, cwd=tmp_path).wait()
        assert ended.codes == (0,), ended.text()
        printed[" ".join(words[place:])] = ended.text()
    assert len(printed) == 10
    assert "3 labels, with their training rows: billing (" in next(iter(printed.values()))
    lines = (tmp_path / "predicted.csv").read_text().splitlines()
    assert lines[0] == "text,prediction,probability,top_k" and len(lines) == 3
    shown = next(
        text for command, text in printed.items() if command.startswith("eval/predict.py") and "got lost" in command
    )
    for line, text in zip(shown.splitlines()[-2:], ("my card was charged twice", "the parcel got lost"), strict=True):
        assert re.fullmatch(rf"\w+ [01]\.\d+ +{text}", line), shown
    assert (tmp_path / "tickets-merged" / "model.safetensors").exists()
    assert run(loading).startswith("[{'label': ")
