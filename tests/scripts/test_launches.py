"""Test refused launches: the exit status, the one line, state.json, and that nothing is written."""

import json
import platform
import subprocess
import sys

import pytest
from launching import ACCELERATE, PYTHON, REPOSITORY, free_port, launch


def refusals_in(text):
    return [line.removeprefix("refused: ") for line in text.splitlines() if line.startswith("refused: ")]


@pytest.mark.slow
def test_a_process_that_does_not_see_the_others_is_refused(workplace):
    """`accelerate launch --cpu --num_processes 2` starts one process."""
    folder, state_file = workplace.folder / "alone", workplace.folder / "alone.state.json"
    flags = workplace.train_flags("alone", "--state-file", state_file)
    launcher = [*ACCELERATE, "--cpu", "--num_processes", 2, "--main_process_port", free_port()]
    run = launch(launcher, "train/sst2.py", flags, folder, workplace.environment)
    assert run.codes == (1,)  # the launcher turns the script's 2 into 1
    (line,) = refusals_in(run.text())
    assert "asked for 2 processes and started 1" in line and "torchrun --nproc_per_node 2" in line
    assert json.loads(state_file.read_text()) == {"state": "refused", "reason": line}
    assert not folder.exists()


@pytest.mark.parametrize("who", [[0, 1], [1]])
def test_ranks_that_know_each_other_refuse_in_one_line_whoever_finds_it(workplace, who):
    name = f"refuse-{len(who)}"
    state_file = workplace.folder / f"{name}.json"
    flags = ["--who", *who, "--state-file", state_file]
    run = workplace.server.start("tests/scripts/one_rank_refuses.py", flags, workplace.folder / name, world=2).wait()
    said = [line for rank in (0, 1) for line in run.text(rank).splitlines() if line.startswith("refused: ")]
    where = "" if 0 in who else f"rank 1 on {platform.node()}: "
    assert said == [f"refused: {where}out of memory on a single item"] and run.codes[1] == 2
    assert json.loads(state_file.read_text())["reason"] == said[0].removeprefix("refused: ")


@pytest.mark.slow
def test_a_refusal_under_python_is_one_line_and_exit_status_2(workplace):
    state_file = workplace.folder / "cold.state.json"
    flags = workplace.train_flags("cold", "--train-file", "no/such.tsv", "--state-file", state_file)
    run = launch(PYTHON, "train/sst2.py", flags, workplace.folder / "cold", workplace.environment)
    assert run.codes == (2,)
    (line,) = run.text().removeprefix("loading the libraries\n").splitlines()
    assert line.startswith("refused: ") and "no/such.tsv: no such file" in line
    assert json.loads(state_file.read_text())["reason"] == line.removeprefix("refused: ")
    assert not run.folder.exists()


@pytest.mark.slow
def test_the_readmes_command_trains_the_sample(workplace):
    """This run is cut short; .ci/run does the whole one."""
    folder = workplace.folder / "sample"
    flags = ["--sample", "--limit-train", 200, "--limit-eval", 100, "--epochs", 1, "--output-dir", folder]
    run = launch(
        [*ACCELERATE, "--main_process_port", free_port()], "train/sst2.py", flags, folder, workplace.environment
    )
    assert run.codes == (0,), run.text()
    assert f"report: {folder / 'report.html'}" in run.text() and (folder / "report.html").stat().st_size > 10_000
    assert run.read_json("eval/base/metrics.json")["setting"] == "zero-shot prompt"
    assert run.read_json("eval/final/metrics.json")["setting"] == "classifier head"
    assert {"run.json", "state.json", "parameters.json", "split.json", "final"} <= {p.name for p in folder.iterdir()}
    timings = run.read_json("run.json")["timings"]
    assert 0 < timings["train_s"] < timings["total_s"] and timings["peak_memory_bytes"] > 2**27


@pytest.mark.parametrize("world", [1, 2])
def test_qlora_with_zero3_is_refused_before_anything_is_loaded_or_written(workplace, world):
    flags = ["--method", "qlora", "--deepspeed", "ds_configs/zero3.json", "--base-eval", "subset"]
    run = workplace.train(f"qlora-zero3-{world}", *flags, world=world, expect=2)
    line = run.refusal()
    assert "--deepspeed ds_configs/qlora.json" in line and "ZeRO-3" in line
    assert run.text().count("refused: ") == 1 and not run.folder.exists()
    assert all("refused" not in run.text(rank) for rank in range(1, world))


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ({"train_batch_size": 99}, [], ["99", "--batch-size 16"]),
        ({"gradient_clipping": 0.3}, [], ["0.3", "--max-grad-norm 1.0"]),
        ({"bf16": {"enabled": True}}, ["--precision", "fp32"], ["--precision fp32", "bf16"]),
        ({"optimizer": {"type": "Adam"}}, [], ["optimizer type Adam", "--optimizer adamw"]),
        ({"scheduler": {"type": "WarmupLR"}}, [], ["scheduler type WarmupLR", "--schedule linear"]),
        ({"gradient_accumulation_steps": 4}, [], ["gradient_accumulation_steps is 4", "--tokens-per-device"]),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_flags_is_refused(workplace, content, flags, words):
    file = workplace.folder / "contradicting.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **content}))
    run = workplace.train("contradicting", "--deepspeed", file, *flags, expect=2)
    assert all(word in run.refusal() for word in words), run.refusal()
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--deepspeed", "no/such.json"], "no such file: no/such.json"),
        (["--deepspeed", "LICENSE"], "is not JSON"),
        (["--max-length", 513], "--max-length 513 is more than the 512 positions"),
        (["--model", "tests"], "has no config.json"),
        (["--precision", "fp16", "--deepspeed", "ds_configs/zero1.json"], "fp16 under DeepSpeed is not supported"),
        (["--attention", "flash_attention_2"], "--attention flash_attention_2 needs"),
    ],
)
def test_what_cannot_be_run_is_refused_and_nothing_is_written(workplace, flags, words):
    run = workplace.train("impossible", *flags, expect=2)
    assert words in run.refusal() and not run.folder.exists()


@pytest.mark.parametrize(
    "script", sorted(f"{path.parent.name}/{path.name}" for path in REPOSITORY.glob("[te][rv]*/*.py"))
)
def test_help_imports_no_torch(script):
    """`--help` has 2 s to answer, and importing torch already takes longer."""
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as error:\n    assert not error.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'matplotlib', 'pandas'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, script], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: ")
