"""Test the answers for a job script before and after it launches a run, and the items an offline job lacks."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import write_run

from zerotune.cluster import smoke
from zerotune.cluster.jobs import (
    PARSERS,
    WORDNET,
    check_offline,
    describe_job,
    describe_progress,
    items_of,
    progress_of,
    read_each,
    read_flags,
)
from zerotune.cluster.prefetch import Item
from zerotune.errors import Refused
from zerotune.settings.flags import train_parser
from zerotune.settings.names import DATASETS
from zerotune.settings.resolve import train_settings
from zerotune.tasks.sst2 import SST2

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sh"))

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--sample"],
        ["--model", "meta-llama/Llama-3.2-1B", "--method", "lora"],
        ["--model=runs/a/final", "--head", "generate", "--learning-rate", "1e-3"],
        ["--output-dir", "runs/elsewhere", "--limit-train", "5"],
    ],
)
def test_the_run_folder_is_the_one_that_the_script_takes(flags):
    settings = train_settings(train_parser("", SST2).parse_args(flags), SST2.name, {})
    assert read_flags("train/sst2.py", flags).folder == settings.run.output_dir


def test_eval_folders_and_tasks():
    assert read_flags("eval/imdb.py", ["--model", "runs/a/final"]).folder == Path("runs/eval-imdb-a")
    assert read_flags("train/qa.py", ["--model", "x/y"]).folder == Path("runs/squad-y-full")
    with pytest.raises(Refused, match=r"train/zero\.py is not a task's script"):
        read_flags("train/zero.py", [])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model"], "^--model needs a value$"),
        (["--sample", "--modle", "x"], "^unknown flag --modle: did you mean --model\\?$"),
        (["--epochs", "three"], "^--epochs must be a whole number, not 'three'$"),
    ],
)
def test_flags_that_the_script_would_refuse(flags, words):
    with pytest.raises(Refused, match=words):
        read_flags("train/sst2.py", flags)


@pytest.mark.parametrize("script", sorted(PARSERS))
def test_each_script_is_read_as_it_reads_itself(script, capsys):
    """Compare each parser's defaults with the script's own --help."""
    source = (REPOSITORY / script).read_text()
    with pytest.raises(SystemExit):
        read_flags(script, ["--help"])
    ours = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    own = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=REPOSITORY)
    assert ours == set(re.findall(r"--[a-z0-9-]+", own.stdout.replace(ast.get_docstring(ast.parse(source)), "")))


def test_progress_changes_with_every_checkpoint_and_milestone(tmp_path):
    run, seen = tmp_path / "run", []
    seen.append(progress_of(run))
    for name in (
        "checkpoints/step-00000005/COMPLETE",
        "eval/base/metrics.json",
        "checkpoints/step-00000120/COMPLETE",
        "final/task.json",
        "eval/final/metrics.json",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
        seen.append(progress_of(run))
    (run / "checkpoints/step-00000300").mkdir()  # without a marker it does not count
    shutil.copytree(run / "checkpoints/step-00000120", run / "checkpoints/step-00000120.bak")
    assert seen == ["0+0+0", "5+0+0", "5+1+0", "120+1+0", "120+2+0", "120+3+0"] and progress_of(run) == "120+3+0"


@pytest.mark.parametrize("place", [".", "eval/base", "seed-1"])
def test_scores_of_an_unfinished_evaluation_are_progress(place, tmp_path):
    partial = tmp_path / place / ".partial"
    partial.mkdir(parents=True)
    (partial / "rank-0.jsonl").write_text("{}\n")
    assert progress_of(tmp_path) == "0+0+3"


def test_what_a_launch_will_do_is_said(tmp_path):
    assert describe_progress(tmp_path) == "fresh"
    state = {"state": "preempted", "reason": "stopped by SIGUSR1 after step 7"}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoints/step-00000007").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000007/COMPLETE").touch()
    assert describe_progress(tmp_path) == "resumed after step 7 (was preempted, stopped by SIGUSR1 after step 7)"
    (tmp_path / "state.json").write_text('{"state": "finished", "reason": null}')
    assert describe_progress(tmp_path) == "finished"


def test_the_first_lines_of_a_job():
    wanted = read_flags("train/sst2.py", ["--sample", "--deepspeed", "ds_configs/zero2.json", "--output-dir", "no/run"])
    environment = {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_GPUS_ON_NODE": "8"}
    lines = describe_job(wanted, environment | {"ZEROTUNE_PROCESSES_PER_NODE": "8"})
    assert lines == [
        "nodes: 4 (node[1-4])",
        "devices: 8 GPUs and 8 processes a node",
        "world size: 32",
        "ZeRO stage: 2 (ds_configs/zero2.json)",
        "run folder: no/run: fresh",
    ]
    plain = describe_job(read_flags("train/sst2.py", ["--sample"]), {})
    assert plain[:4] == [
        "nodes: 1 (this one)",
        "devices: CPU and 1 process a node",
        "world size: 1",
        "ZeRO stage: none",
    ]


# --- what a run reads ---


def test_items_of_a_command_line(tmp_path):
    def items(script, *flags):
        return items_of(read_flags(script, list(flags)))

    model = Item("model", "meta-llama/Llama-3.2-1B", "main")
    flags = ["--model", model.name, "--revision", "main"]
    assert items("train/sst2.py", "--sample") == []
    assert items("train/sst2.py", *flags) == [model, Item("dataset", "stanfordnlp/sst2")]
    assert items("train/imdb.py", *flags, "--train-file", "a.csv") == [model]
    assert items("train/classify.py", *flags, "--train-file", "a.csv") == [model]
    assert items("train/classify.py", *flags, "--glue", "mrpc") == [model, Item("dataset", "nyu-mll/glue/mrpc")]
    assert items("eval/sst2.py", *flags, "--dataset", "me/mine:test") == [model, Item("dataset", "me/mine")]
    assert items("train/qa.py", *flags)[1:] == [Item("dataset", DATASETS["squad"]), Item("wordnet")]
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "revision": "v2"}))
    source = {"dataset": "stanfordnlp/sst2", "revision": "abc"}
    (tmp_path / "run" / "split.json").write_text(json.dumps({"sources": {"train": source | {"sha256": "5a"}}}))
    found = items("eval/sst2.py", "--model", str(final))
    assert found == [Item("model", "org/base", "v2"), Item("dataset", "stanfordnlp/sst2", "abc")]
    (tmp_path / "run" / "run.json").write_text("{}")
    assert items("eval/sst2.py", "--model", str(tmp_path / "run")) == found  # a run stands for its final/
    (final / "adapter_config.json").unlink()
    final.rmdir()
    with pytest.raises(Refused, match="has no final/ yet"):
        items("eval/sst2.py", "--model", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("command", "reads"),
    [
        ("train --test-file x.tsv", True),  # its train rows come from the hub
        ("train --train-file x.tsv --test-file y.tsv", False),
        ("eval --test-file x.tsv", False),
        ("eval --train-file x.tsv --shots 2", True),  # the file only provides shots
        ("eval --test-file x.tsv --shots 2", True),
        ("eval --test-file x.tsv --shots 2 --train-file y.tsv", False),
        ("eval --split 80-20 --train-file x.tsv", False),
    ],
)
def test_the_hubs_rows_are_wanted_where_they_are_read(command, reads, tmp_path):
    script, *flags = command.split()
    found = items_of(read_flags(f"{script}/sst2.py", ["--model", str(tmp_path), *flags]))
    assert found == ([Item("dataset", "stanfordnlp/sst2")] if reads else [])


def test_without_wordnet_a_job_goes_on_and_says_what_is_left_out(capsys):
    check_offline(read_flags("train/qa.py", ["--sample"]))
    assert "METEOR will be left out" in capsys.readouterr().out


def test_a_score_file_wants_no_model(tmp_path):
    flags = ["--score", "predictions.json", "--test-file", "dev.json"]
    assert items_of(read_flags("eval/qa.py", flags)) == [WORDNET]


def test_models_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for model in ("./typo", "runs/a/final", "/no/where"):
        with pytest.raises(Refused, match=f"no such folder: --model {model}"):
            check_offline(read_flags("train/sst2.py", ["--model", model]))
    with pytest.raises(Refused, match=r"model runs/typo \(no such folder, and never fetched\)"):
        check_offline(read_flags("train/sst2.py", ["--model", "runs/typo"]))


def test_what_is_missing_is_said_with_the_line_that_fetches_it(own_cache):
    wanted = read_flags("train/sst2.py", ["--model", "org/a", "--revision", "v1"])
    with pytest.raises(Refused) as refusal:
        check_offline(wanted)
    line = str(refusal.value)
    assert f"not in the cache {own_cache}: model org/a at v1 (never fetched); dataset stanfordnlp/sst2 (never" in line
    assert line.endswith("bash slurm/prefetch.sh --model org/a@v1 --dataset stanfordnlp/sst2")


def test_a_job_cannot_upload_and_wants_its_files(tmp_path):
    with pytest.raises(Refused, match=r"eval/publish\.py runs/a me/mine"):
        check_offline(read_flags("train/sst2.py", ["--sample", "--push-to-hub", "me/mine", "--output-dir", "runs/a"]))
    with pytest.raises(Refused, match=r"--train-file .*absent\.tsv: no such file on this node"):
        check_offline(
            read_flags("train/sst2.py", ["--model", str(tmp_path), "--train-file", str(tmp_path / "absent.tsv")])
        )


# --- the scripts themselves ---


def test_there_is_a_script_for_each_purpose():
    assert {path.stem for path in SCRIPTS} >= {
        "sst2",
        "imdb",
        "qa",
        "classify",
        "eval",
        "smoke",
        "prefetch",
        "common",
        "on_node",
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_by_shellcheck(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", "--external-sources", path], capture_output=True, text=True, cwd=REPOSITORY)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if "#SBATCH" in path.read_text()], ids=lambda path: path.name
)
def test_job_scripts_suit_any_site(path):
    text = path.read_text()
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --output=runs/slurm/%j.log" in directives and (REPOSITORY / "runs/slurm").is_dir()
    assert not [line for line in directives if "$" in line or "gpu" in line or "gres" in line or "partition" in line]
    assert "SLURM_SUBMIT_DIR" in text  # the script that runs is a copy in SLURM's spool folder


def test_the_login_node_hears_what_a_job_would_miss(own_cache, tmp_path):
    environment = {
        "PATH": "/usr/bin:/bin",
        "ZEROTUNE_PYTHON": sys.executable,
        "HF_HOME": str(own_cache),
        "HOME": str(tmp_path),
    }
    command = ["bash", "slurm/sst2.sh", "--model", "org/never-fetched"]

    def ask(**more):
        given = environment | more
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=given)

    assert ask(ZEROTUNE_ONLINE="1").returncode == 0
    assert "ZEROTUNE_ATTEMPTS is 'many': wanted a whole number, at least 1" in ask(ZEROTUNE_ATTEMPTS="many").stdout
    ended = ask()
    assert ended.returncode == 2 and "run folder: runs/sst2-never-fetched-full: fresh" in ended.stdout
    assert "bash slurm/prefetch.sh --model org/never-fetched --dataset stanfordnlp/sst2" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "written", "goes_on"),
    [
        ("--resume never", [], False),
        ("--resume never", ["state.json"], True),
        ("--resume=never", ["state.json"], True),
        ("--resume runs/a/checkpoints/step-00000002", ["state.json"], False),
        ("--resume runs/a/checkpoints/step-00000002", ["state.json", "checkpoints/step-00000004/COMPLETE"], True),
        ("", ["state.json"], False),
    ],
)
def test_resume_is_said_of_a_jobs_first_start(tmp_path, flags, written, goes_on):
    run, begun = tmp_path / "run", tmp_path / "7.begun"
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    (run / "checkpoints/step-00000002/COMPLETE").touch()
    begun.touch()
    os.utime(run / "checkpoints/step-00000002/COMPLETE", (1, 1))
    for name in written:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
        os.utime(run / name, (begun.stat().st_mtime + 5,) * 2)
    line = f". slurm/common.sh && job_files={tmp_path / '7'} && has_left_resume {run} train/sst2.py {flags}"
    assert (subprocess.run(["bash", "-c", line], cwd=REPOSITORY).returncode == 0) == goes_on


@pytest.mark.parametrize(
    ("flag", "said"),
    [(1, "requeued (SIGUSR1)"), (0, "this site forbids requeueing: submit the same command again, it resumes")],
)
def test_a_busy_controller_is_asked_again_to_requeue(tmp_path, flag, said):
    (tmp_path / "scontrol").write_text(
        "#!/bin/bash\n"
        f'case "$*" in *show*) echo "JobState=RUNNING Requeue={flag}"; exit ;; esac\n'
        f"[ {flag} = 1 ] && [ -e {tmp_path}/asked ] && exit\n"
        f"touch {tmp_path}/asked; echo 'Socket timed out on send/recv operation' >&2; exit 1\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    state = f"job_files={tmp_path}/7 job_name=7 stop_reason=SIGUSR1 ZEROTUNE_FAILED_FILE={tmp_path}/7.failed"
    line = f". slurm/common.sh; sleep() {{ :; }}; {state}; echo 4+0 0 >$job_files.attempts; launch_again_or_end 5+0 1"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ended.returncode == 75 and ended.stdout == f"slurm: {said}\n"


# --- several runs ---


def answer(*words, **environment):
    command = [sys.executable, "-m", "zerotune.cluster.jobs", *map(str, words)]
    own = {"ZEROTUNE_ONLINE": "1", **os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=own)


def test_the_runs_of_seeds_are_numbered_for_an_array(tmp_path):
    flags = ["train/sst2.py", "--sample", "--seeds", "5", "6", "--output-dir", tmp_path / "several"]
    plan = answer("plan", *flags).stdout
    assert plan.startswith("2 runs: each in its own job with `sbatch --array=1-2`, else one after the other in one job")
    assert f"run folder: {tmp_path}/several/seed-6: fresh" in plan and not (tmp_path / "several").exists()
    assert answer("members", *flags).stdout == "1 2\n" and (tmp_path / "several/sweep.json").exists()
    words = ["train/sst2.py", "--sample", "--seed", "6", "--output-dir", f"{tmp_path}/several/seed-6"]
    assert answer("member", 2, *flags).stdout.split("\0") == [*words, ""]
    assert "there is no run 0 of 2: submit them with sbatch --array=1-2" in answer("member", 0, *flags).stderr
    assert "--launcher has no use on the cluster" in answer("members", *flags, "--launcher", "torchrun").stderr
    assert "--plan starts no run: use bash slurm/sst2.sh" in answer("members", *flags, "--plan").stderr
    (tmp_path / "file").touch()
    in_a_file = ["train/sst2.py", "--sample", "--seeds", "5", "--output-dir", tmp_path / "file" / "several"]
    refused = answer("members", *in_a_file)
    assert refused.returncode == 2 and refused.stderr.startswith("refused: --output-dir ")
    write_run(tmp_path / "several/seed-5", 0.8, 0.7)
    assert answer("members", *flags).stdout == "2\n"
    assert answer("summarise", *flags, SLURM_ARRAY_TASK_ID="1").returncode == 0
    alone = answer("summarise", *flags)
    assert alone.returncode == 2 and "1 of 2 runs are not finished ('seed-6')" in alone.stderr
    write_run(tmp_path / "several/seed-6", 0.9, 0.8)
    done = answer("summarise", *flags)
    assert done.returncode == 0 and "0.8500 ± 0.0707" in done.stdout


@pytest.mark.parametrize(("task", "wanted"), [(None, ["seed-0", "seed-1", "seed-2"]), ("2", ["seed-1"])])
def test_a_job_does_all_runs_and_a_task_of_an_array_its_own(tmp_path, task, wanted):
    """With a replaced run_one, the second run is refused and the others still run."""
    fake = f"{sys.executable} {REPOSITORY / 'tests/fake_run.py'}"
    line = (
        f'. slurm/common.sh; job_files={tmp_path}/7; run_one() {{ {fake} "$@" --state-file {tmp_path}/state; }}; '
        f"run_members train/sst2.py --seeds 0 1 2 --output-dir {tmp_path}/several"
    )
    (tmp_path / "several").mkdir()
    (tmp_path / "several/.fates.json").write_text('{"seed-1": "refused"}')
    environment = {**os.environ, "ZEROTUNE_PYTHON": sys.executable} | ({"SLURM_ARRAY_TASK_ID": task} if task else {})
    ended = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and (tmp_path / "several/calls.txt").read_text().split() == wanted
    if task is None:
        assert "values of 2 of 3 seeds" in ended.stdout and "1 of 3 runs are not finished ('seed-1')" in ended.stderr


def test_what_a_sweep_of_models_reads_is_fetched_for_each(tmp_path):
    (tmp_path / "models.txt").write_text("--model org/a org/b\n")
    every = read_each("train/sst2.py", ["--sweep", str(tmp_path / "models.txt")])
    assert [items_of(wanted)[0].name for wanted in every] == ["org/a", "org/b"]


# --- the smoke run ---


def test_the_toolkit_is_that_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smoke.toolkit() is None
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert smoke.toolkit() == "12.8"
