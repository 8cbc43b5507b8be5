"""Run docs/own-data.md from its first line to its last, in an otherwise empty folder, with a tiny model."""

import os
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
    alone = workplace.environment | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}

    def run(*command, expect=0):
        ended = subprocess.run(command, cwd=tmp_path, env=alone, text=True, capture_output=True, timeout=600)
        assert ended.returncode == expect, ended.stdout + ended.stderr
        return ended.stdout

    run(sys.executable, "-c", writing)
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
        printed[" ".join(words[place:])] = run(sys.executable, str(REPOSITORY / script), *flags)
    assert len(printed) == 10
    assert "3 labels, with their training rows: billing (" in next(iter(printed.values()))
    lines = (tmp_path / "predicted.csv").read_text().splitlines()
    assert lines[0] == "text,prediction,probability,top_k" and len(lines) == 3
    shown = next(
        text for command, text in printed.items() if command.startswith("eval/predict.py") and "got lost" in command
    )
    assert len(shown.splitlines()) == 2
    assert os.path.exists(tmp_path / "tickets-merged" / "model.safetensors")
    assert run(sys.executable, "-c", loading).startswith("[{'label': ")
