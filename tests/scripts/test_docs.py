"""Scripts accept the command lines of README and docs; sample runs work, as does docs/train.md's changed script."""

import argparse
import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
from launching import REPOSITORY

SCRIPTS = sorted(path for folder in ("train", "eval") for path in (REPOSITORY / folder).glob("*.py"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LAUNCHERS = ("accelerate", "python", "torchrun", "sbatch", "bash", ".venv/bin/python")
COPY = "my_sst2.py"  # the copy of train/sst2.py in docs/train.md
COPY_OPTIONS = ("--sample", "--max-steps", 4, "--limit-train", 64, "--limit-eval", 32, "--base-eval", "none")
# Quick runs, which only test that the command works.
FEW_TRAINED = ("--max-steps", 2, "--limit-train", 64, "--limit-eval", 16, "--base-eval", "none")
FEW_EVALUATED = ("--limit-eval", 16)


@dataclass(frozen=True)
class Command:
    """A command line that starts a script, and the page or script that contains it."""

    source: str
    script: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}: {self.script} {' '.join(self.flags)}"


def code_lines(text: str) -> list[str]:
    """Return the lines of indented code with continuations joined, and the code spans of the prose."""
    text = re.sub(r" *\\\n *", " ", text)
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return indented + re.findall(r"`([^`\n]+)`", text)


def script_of(word: str) -> str | None:
    """Return the script that a word of a command line starts: itself, a job script's, or the original of the copy."""
    job = re.fullmatch(r"slurm/(sst2|imdb|qa|classify)\.sh", word)
    if job:
        return f"train/{job[1]}.py"
    if word == COPY:
        return "train/sst2.py"
    return word if re.fullmatch(r"(train|eval)/\w+\.py|tests/\w+/\w+\.py", word) else None


def commands_in(source: str, text: str) -> list[Command]:
    """Return the command lines in a text that pass flags to a script, and those that start a benchmark without."""
    found = []
    for line in code_lines(text):
        loop = re.fullmatch(r"for (\w+) in (\S+).*?; do (.*); done", line)
        if loop:
            line = loop[3].replace(f"${loop[1]}", loop[2])
        for part in re.split(r" && |; ", line):
            try:
                words = [word for word in shlex.split(part, comments=True) if word != "…"]
            except ValueError:  # a quotation in prose
                continue
            scripts = [script_of(word) for word in words]
            place = next((place for place, script in enumerate(scripts) if script), None)
            if place is None or not (place == 0 or words[0] in LAUNCHERS):
                continue
            if len(words) > place + 1 or (place and scripts[place].startswith("tests/")):
                found.append(Command(source, scripts[place], tuple(words[place + 1 :])))
    return found


def all_commands() -> list[Command]:
    """Return the commands of README, docs and the scripts' own docstrings."""
    texts = {path.name: path.read_text() for path in PAGES}
    texts |= {f"{path.parent.name}/{path.name}": ast.get_docstring(ast.parse(path.read_text())) for path in SCRIPTS}
    return [command for source, text in texts.items() for command in commands_in(source, text)]


COMMANDS = all_commands()


def test_commands_are_found():
    text = """
    for shots in 0 1; do python eval/imdb.py --shots $shots \\
        --sample; done
    sbatch --nodes 2 slurm/qa.sh --epochs 1   # two nodes
    cp train/sst2.py my_sst2.py && accelerate launch my_sst2.py --sample
Prose names `train/sst2.py` and `accelerate launch train/imdb.py … --plan`."""
    assert [(command.script, command.flags) for command in commands_in("text", text)] == [
        ("eval/imdb.py", ("--shots", "0", "--sample")),
        ("train/qa.py", ("--epochs", "1")),
        ("train/sst2.py", ("--sample",)),
        ("train/imdb.py", ("--plan",)),
    ]
    assert {command.script for command in COMMANDS} >= {f"{path.parent.name}/{path.name}" for path in SCRIPTS}
    assert len({command.source for command in COMMANDS}) > 8


@pytest.mark.parametrize("script", sorted({command.script for command in COMMANDS if command.script[:5] != "tests"}))
def test_the_scripts_parsers_accept_the_commands(script, monkeypatch, capsys):
    parsed = []
    monkeypatch.setattr("zerotune.run.process.run_script", lambda main, args: parsed.append(args))
    of_script = [command for command in COMMANDS if command.script == script]
    for command in of_script:
        monkeypatch.setattr(sys, "argv", [script, *command.flags])
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit:
            pytest.fail(f"{command}\n{capsys.readouterr().err.splitlines()[-1]}")
    assert len(parsed) == len(of_script)


class Parsed(Exception):
    """Raised where a benchmark has parsed its flags and would begin."""


@pytest.mark.parametrize("script", sorted({command.script for command in COMMANDS if command.script[:5] == "tests"}))
def test_the_benchmarks_parsers_accept_the_commands(script, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None, namespace=None):
        parse(parser, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.syspath_prepend(REPOSITORY / Path(script).parent)
    assert "parse_args(" in (REPOSITORY / script).read_text(), "it would run whole"
    for command in [command for command in COMMANDS if command.script == script]:
        monkeypatch.setattr(sys, "argv", [script, *command.flags])
        try:
            with pytest.raises(Parsed):
                runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit:
            pytest.fail(f"{command}\n{capsys.readouterr().err.splitlines()[-1]}")


def sample_commands() -> list[Command]:
    """Return the distinct sample commands that no other test runs. A sweep has seeds too: others are left out."""
    of_sample = [one for one in COMMANDS if "--sample" in one.flags and one.flags != ("--sample",)]
    of_sample = [one for one in of_sample if "--seeds" not in one.flags or "--sweep" in one.flags]
    of_sample += [one for one in COMMANDS if one.flags == ("--sample",) and one.script != "train/sst2.py"]
    key = lambda one: (one.script, one.flags)  # noqa: E731
    return [next(same) for _, same in groupby(sorted(of_sample, key=key), key=key)]


@pytest.mark.slow
@pytest.mark.parametrize("command", sample_commands(), ids=str)
def test_sample_commands_run(command, workplace):
    folder = workplace.folder / f"docs-{sample_commands().index(command)}"
    few = FEW_TRAINED if command.script.startswith("train/") else FEW_EVALUATED
    flags = [*command.flags, *few, "--output-dir", folder]
    run = workplace.server.start(command.script, flags, folder).wait()
    assert run.codes == (0,), run.text()
    assert run.read_json("state.json")["state"] == "finished"


@pytest.mark.slow
def test_the_changed_copy_of_a_script_trains_and_logs_its_metric(workplace, tmp_path):
    """Apply the diff in docs/train.md with git as a user may: another loss and one more metric, in ten lines."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (REPOSITORY / "docs" / "train.md").read_text(), re.DOTALL)
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]
    assert len(changed) <= 10
    copy = tmp_path / COPY
    shutil.copy(REPOSITORY / "train" / "sst2.py", copy)
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    applied = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, env=alone, capture_output=True)
    assert applied.returncode == 0, f"the diff in docs/train.md does not fit train/sst2.py: {applied.stderr}"
    folder = workplace.folder / "changed-copy"
    run = workplace.server.start(str(copy), [*COPY_OPTIONS, "--output-dir", folder], folder).wait()
    assert run.codes == (0,), run.text()
    lines = run.read_lines("metrics.jsonl")
    validations = [line for line in lines if "eval_loss" in line]
    assert all(0 < line["eval_balanced_accuracy"] < 1 for line in validations)
    # at a probability of 0.5, cross-entropy (the validation loss) is 0.69 and focal loss is a quarter of that
    assert 0.1 < lines[0]["loss"] < 0.4 and 0.5 < validations[-1]["eval_loss"] < 1


@pytest.mark.slow
def test_a_copy_with_another_prompt_schedule_and_order_trains(workplace, tmp_path):
    """Insert docs/train.md's lines for the prompt, the learning rate and the order of the examples into one copy."""
    prompt, rate, order = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "train.md").read_text(), re.DOTALL)
    assert "Wording(" in prompt and "(step - 1) // 1000" in rate and "epoch_steps" in order
    rate = rate.replace("// 1000", "// 2")
    script = (REPOSITORY / "train" / "sst2.py").read_text()
    imports, schedule = "from zerotune.tasks.sst2 import SST2\n", r"( *)schedule = plan_schedule\(.*\n"
    plan = re.search(schedule, script)
    at_plan = textwrap.indent(rate + order, plan[1])
    copy = tmp_path / COPY
    copy.write_text(script.replace(plan[0], plan[0] + at_plan).replace(imports, imports + prompt))
    folder = workplace.folder / "other-schedule"
    run = workplace.server.start(
        str(copy), [*COPY_OPTIONS, "--log-every", 1, "--base-eval", "full", "--output-dir", folder], folder
    ).wait()
    assert run.codes == (0,), run.text()
    rates = [line["learning_rate"] for line in run.read_lines("metrics.jsonl") if "learning_rate" in line]
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4]
    assert run.read_json("eval/base/metrics.json")["label_words"] == ["bad", "good"]


def message_texts() -> str:
    """Return the strings of library and scripts, with "…" for filled-in parts, and the text of the job scripts."""
    texts = [path.read_text() for path in sorted((REPOSITORY / "slurm").glob("*.sh"))]
    for path in [*sorted((REPOSITORY / "zerotune").rglob("*.py")), *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_in_troubleshooting_exist():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    ours, _ = page.split("## From other programs")
    messages = re.findall(r"^\| `([^`]+)`", ours, re.MULTILINE)
    texts = message_texts()
    absent = [one for one in messages if not all(part.strip() in texts for part in one.split("…"))]
    assert len(messages) > 20 and not absent
