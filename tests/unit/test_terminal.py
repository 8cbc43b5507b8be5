"""Output that cannot be written or encoded ends no run."""

import subprocess
import sys

import pytest

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
