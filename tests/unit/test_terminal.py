"""A run survives output that cannot be written or encoded."""

import subprocess
import sys
import time

import pytest

from zerotune import terminal
from zerotune.terminal import duration, say_when_slow, show_progress

PRINTS = "from zerotune.terminal import make_output_tolerant as m; m(); "
LOOP = "print('α ± β', flush=True); [print('line', n, flush=True) for n in range(2000)]; "
END = "import sys; sys.stderr.write('reached the end'); sys.stderr.flush()"


def run(command, **given):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, **given)


@pytest.mark.parametrize("output", ["> /dev/full", "| head -n 1", ">&-", "> /dev/null"])
def test_a_full_or_closed_output_ends_nothing(output):
    ended = run(f'set -o pipefail; {sys.executable} -c "{PRINTS}{LOOP}{END}" {output}')
    assert ended.returncode == 0 and "reached the end" in ended.stderr, ended.stderr


def test_what_an_output_cannot_encode_is_escaped():
    ended = run(f'PYTHONIOENCODING=ascii {sys.executable} -c "{PRINTS}{LOOP}{END}"')
    assert ended.returncode == 0 and ended.stdout.splitlines()[0] == "\\u03b1 \\xb1 \\u03b2"


@pytest.mark.parametrize("script", ["train/sst2.py", "train/qa.py", "eval/compare.py"])
def test_help_in_ascii(script):
    ended = run(f"PYTHONIOENCODING=ascii {sys.executable} {script} --help")
    assert ended.returncode == 0 and "usage:" in ended.stdout, ended.stderr


# --- progress ---


def test_what_cannot_say_how_far_it_is_says_that_it_is_at_work(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "FIRST_LINE", 0.02)
    with say_when_slow("loading the weights of m"):
        time.sleep(0.3)
    with say_when_slow("quick"):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == "loading the weights of m: 0.02 s so far\n"


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_after_5_seconds_and_then_every_30(clock, capsys):
    with show_progress("evaluation runs/a", total=200, done=100) as progress:
        for _ in range(100):  # one second each
            clock[0] += 1
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "evaluation runs/a: 52%, about 2 min left",  # an earlier start's work does not count for the speed
        "evaluation runs/a: 68%, about 1 min left",
        "evaluation runs/a: 82%, about 35 s left",
        "evaluation runs/a: 98%, about 5 s left",
    ]


def test_steps_are_numbered_and_what_is_quick_or_hidden_says_nothing(clock, capsys):
    with show_progress("train", total=3000, unit="step") as progress:
        clock[0] += 6
        progress.update(1200)
    assert capsys.readouterr().err == "train: step 1,200 of 3,000, 40%, about 9 s left\n"
    for total, hidden in ((1, False), (9, True)):
        with show_progress("train", total=total, hidden=hidden) as progress:
            clock[0] += 60
            progress.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_live_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with show_progress("train", total=2, unit="step") as progress:
        progress.update()
    with show_progress("evaluation", total=2) as progress:  # ends before it would be drawn
        progress.update()
    shown = capsys.readouterr().err
    assert "\rtrain:" in shown and "1/2" in shown and "evaluation" not in shown


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (12_010, "3 h 20 min")])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_remarks_that_mean_nothing_are_hidden_and_all_else_is_not():
    code = (
        "import logging, warnings; from zerotune.terminal import REMARKS, hide_remarks; hide_remarks()\n"
        "for name, text in REMARKS.items():\n"
        "    logging.getLogger(name).warning(text + ': …')\n"
        "    logging.getLogger(name).warning('kept')\n"
        "warnings.warn('`torch.distributed.all_gather_into_tensor` is deprecated. Use', FutureWarning)\n"
        "warnings.warn('kept, too', FutureWarning)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("  ")]
    assert lines[:2] == ["kept", "kept"] and lines[2].endswith("kept, too") and len(lines) == 3, ended.stderr
