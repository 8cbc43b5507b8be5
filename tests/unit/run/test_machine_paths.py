"""Paths of the machine are shortened to their last names; other slashes stay."""

from pathlib import Path

import pytest

from zerotune.run.machine_paths import left_paths, without_paths


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("--model /home/ann/models/llama --seed 0", "--model llama --seed 0"),
        ("--output-dir=/scratch/job-17/runs/a/", "--output-dir=a"),
        ('{"model": "../../ann/llama", "n": 1}', '{"model": "llama", "n": 1}'),
        ("<td>~/data/tickets.csv</td>", "<td>tickets.csv</td>"),
        ("--scratch-dir /local/ann /localscratch/ann/x", "--scratch-dir ann x"),
        ("(/tmp/a.tsv, /work/b.tsv).", "(a.tsv, b.tsv)."),
        ("and/or a/../b, 3/4, https://host/home/x, </data>, runs/a/final", None),
        ("/ and /unheard-of/thing", None),
    ],
)
def test_paths_keep_their_last_names(text, left):
    assert without_paths(text) == (text if left is None else left)


def test_a_run_folder_with_spaces(tmp_path):
    run = tmp_path / "my runs" / "a b"
    run.mkdir(parents=True)
    assert str(tmp_path) not in without_paths(f"see {run}/final.", run)
    assert left_paths(f"see {run}/final", run) and not left_paths("https://host/root/x, and/or", run)
    assert left_paths(f"{Path.home()}/x")
