"""Runs that end early, by a number that is not finite or a full disk, print one line and can resume."""

import re
import subprocess

import pytest
from comparing import OFTEN, assert_same_bits, killed_at, newest_step
from launching import PYTHON, free_port, launch


def test_a_loss_that_is_not_finite_stops_the_run(workplace):
    flags = [*OFTEN, "--max-grad-norm", "none", "--warmup-ratio", 0, "--learning-rate", 1e30]
    run = workplace.train("diverged", *flags, "--eval-every", 100, "--checkpoint-every", 1, expect=2)
    line = run.refusal()
    assert re.search(r"the (loss|gradient norm) of step 2 is (nan|inf)", line)
    assert len(re.findall(r"\btrain-\d+", line)) == 16 and "last good checkpoint: " in line and "step-00000001" in line
    assert run.read_json("state.json") == {"state": "refused", "reason": line}
    assert [row["step"] for row in run.read_lines("metrics.jsonl")] == [1]


def test_an_evaluation_that_is_not_finite_stops_the_run(workplace):
    """The head's rate exceeds float32's range: its weights are infinite after step 1, whose own loss is fine."""
    flags = [*OFTEN, "--warmup-ratio", 0, "--head-learning-rate", 1e39, "--eval-every", 1]
    run = workplace.train("diverged-evaluation", *flags, expect=2)
    line = run.refusal()
    assert "the evaluation after step 1 has a loss of nan" in line and "last good checkpoint: none" in line
    assert run.read_json("state.json")["state"] == "refused" and newest_step(run) is None


@pytest.fixture
def small_disk(workplace):
    """Mount a separate disk of 80 MiB: a checkpoint fits, and the 64 MiB that a save must leave free."""
    folder = workplace.folder / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "path"),
    [
        ("os.mkdir", r"\.writing-step-00000004$"),  # found before the save
        ("open", r"\.writing-step-00000004/model\.safetensors$"),  # in the middle of a save
        ("open", r"\.writing-step-00000004/\.manifest\.json"),  # at its end
        ("open", r"/metrics\.jsonl$"),  # while logging, before the first checkpoint
    ],
)
def test_a_full_disk_ends_cleanly_and_the_run_goes_on_when_there_is_room(workplace, small_disk, event, path):
    filler = small_disk / "filler"
    run = workplace.train("small-disk/run", *OFTEN, expect=2, **killed_at(event, path, do=str(filler)))
    assert "disk full" in run.refusal()
    assert newest_step(run) == (None if "metrics" in path else 2)
    filler.unlink()
    assert_same_bits(workplace.train("small-disk/run", *OFTEN), workplace.train_once("undisturbed", *OFTEN))


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_named(workplace):
    """The limit is `ulimit -f` of a shell or a scheduler, in units of 1024 bytes."""
    reference = workplace.train_once("undisturbed", *OFTEN)  # the token cache is also larger than the limit
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *PYTHON]
    flags = workplace.train_flags("limited", *OFTEN)
    run = launch(limited, "train/sst2.py", flags, workplace.folder / "limited", workplace.environment)
    assert run.codes == (2,) and "file too large: " in run.refusal() and "(ulimit -f)" in run.refusal()
    assert "raise that limit and start the same command again" in run.refusal()
    assert run.read_json("state.json") == {"state": "refused", "reason": run.refusal()}
    assert_same_bits(workplace.train("limited", *OFTEN), reference)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_never_joins_is_named_after_the_timeout(workplace, rank):
    """Rank 1 prints the line too, because there may be no rank 0 to do it."""
    port = free_port()
    place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "ZEROTUNE_COLLECTIVE_TIMEOUT": "3"}
    environment = workplace.environment | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    name = f"lonely-{rank}"
    run = launch(PYTHON, "train/sst2.py", workplace.train_flags(name), workplace.folder / name, environment)
    assert f"not all 2 processes of this run have met at 127.0.0.1:{port} within 3 s" in run.text()
    assert run.codes == (1,) and "Traceback" not in run.text() and not run.folder.exists()
