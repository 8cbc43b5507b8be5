"""After a failure in a running job, the run ends like the undisturbed one, or with one clear line.

Tolerance: comparing.CURVE for the loss and gradient norm of every step, comparing.WEIGHTS for the final weights. The
undisturbed run is one process; most of these are two or more, so the order of sums differs.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
from comparing import WEIGHTS, assert_same_curve, weight_difference
from site_of_tests import ZERO2, assert_undisturbed
from waiting import wait_until

RANK = "train/sst2.py --model llama"


def ranks_of(cluster, node):
    """Return the process ids of a node's ranks: the script's processes without the launchers."""
    launchers = {*cluster.processes(node, "accelerate_cli"), *cluster.processes(node, "on_node.sh")}
    return [pid for pid in cluster.processes(node, RANK) if pid not in launchers]


def test_a_rank_killed_starts_all_again_in_the_same_job(site, cluster, undisturbed):
    job = site.train("killed", *ZERO2, "--resume", "never")  # applies only to the first start
    site.wait_for_step("killed", 6)
    os.kill(ranks_of(cluster, "node2")[-1], signal.SIGKILL)
    job.wait()
    assert job.num_restarts == 0 and "launched again from the last checkpoint" in job.log
    assert_undisturbed(site, "killed", job, undisturbed)


def test_a_failing_question_and_a_foreign_array_end_no_job(site, undisturbed):
    """The first plan fails, as on a disk that does not answer; a task of an array has submitted this job."""
    python, asked = site.folder / "python-that-fails-once", site.folder / "asked"
    python.write_text(
        f"""#!/usr/bin/env bash
if [[ "$*" == *"cluster.jobs plan"* ]] && ! [ -e "{asked}" ]; then
  : >"{asked}"
  exit 1
fi
exec "{sys.executable}" "$@"
"""
    )
    python.chmod(0o755)
    array = {"SLURM_ARRAY_JOB_ID": "999999", "SLURM_ARRAY_TASK_ID": "7"}
    job = site.train("asked-again", nodes=1, ZEROTUNE_PYTHON=str(python), **array).wait()
    assert "slurm: the question 'plan' has failed (status 1)" in job.log and asked.exists()
    assert_undisturbed(site, "asked-again", job, undisturbed)


def test_a_rank_that_hangs_is_given_up(site, cluster, undisturbed):
    job = site.train("hung", ZEROTUNE_COLLECTIVE_TIMEOUT="15")
    site.wait_for_step("hung", 6)
    os.kill(ranks_of(cluster, "node2")[-1], signal.SIGSTOP)
    job.wait()
    assert job.num_restarts == 0 and "launched again from the last checkpoint" in job.log
    assert_undisturbed(site, "hung", job, undisturbed)


def test_a_node_that_crashes_requeues_the_job(site, cluster, undisturbed):
    job = site.train("crashed")
    site.wait_for_step("crashed", 6)
    cluster.crash("node2")
    try:
        wait_until(lambda: cluster.job(job.number)["JobState"] != "RUNNING", "SLURM takes the job away", 90)
    finally:
        cluster.boot("node2")
    job.wait()
    assert job.num_restarts == 1
    assert_undisturbed(site, "crashed", job, undisturbed)


@pytest.mark.parametrize("step", [0, 6], ids=["among its launchers", "in a step"])
def test_a_node_that_is_back_before_slurm_has_missed_it_is_given_up(step, site, cluster, undisturbed):
    name = f"blinked-{step}"
    job = site.train(name, ZEROTUNE_COLLECTIVE_TIMEOUT="20", ZEROTUNE_END_TIMEOUT="10")
    wait_until(lambda: cluster.processes("node2", "accelerate_cli"), "node2 has a launcher")
    site.wait_for_step(name, step)
    cluster.crash("node2")
    cluster.boot("node2")
    job.wait()
    assert job.num_restarts == 1 and "requeued (a node that " in job.log
    assert_undisturbed(site, name, job, undisturbed)


def test_a_rank_that_hangs_when_all_are_to_stop_does_not_keep_the_job(site, cluster, undisturbed):
    """Otherwise the job would wait until the time limit ended it for good."""
    job = site.train("stuck", ZEROTUNE_STOP_TIMEOUT="10")
    site.wait_for_step("stuck", 6)
    os.kill(ranks_of(cluster, "node2")[-1], signal.SIGSTOP)
    cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait()
    assert job.num_restarts == 1 and "the ranks were asked to stop and have not" in job.log
    assert_undisturbed(site, "stuck", job, undisturbed)


def test_the_second_job_on_a_run_folder_refuses(site, cluster, undisturbed):
    job = site.train("shared", nodes=1)
    site.wait_for_step("shared", 1)
    (rank,) = ranks_of(cluster, "node1")
    os.kill(rank, signal.SIGSTOP)  # until the second job is refused
    second = site.train("shared", nodes=1)
    try:
        second.wait("FAILED")
    finally:
        os.kill(rank, signal.SIGCONT)
    assert "another job is working in runs/shared" in second.log and "launched again" not in second.log
    job.wait()
    assert_undisturbed(site, "shared", job, undisturbed)


def test_a_controller_that_dies_takes_no_run_along(site, cluster, undisturbed):
    job = site.train("orphaned")
    site.wait_for_step("orphaned", 6)
    cluster.kill_controller()
    site.wait_for_step("orphaned", 12)
    cluster.start_controller()
    job.wait()
    assert job.num_restarts == 0
    assert_undisturbed(site, "orphaned", job, undisturbed)


@pytest.fixture
def scratch(cluster):
    """Return the path of node1's own 256 MiB disk on the node, and the same folder as seen from here."""
    outside = Path(f"/proc/{cluster.nodes['node1'].pid}/root{cluster.folder}/scratch")
    yield cluster.folder / "scratch", outside
    for path in outside.glob("filler"):
        path.unlink()


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(site, scratch, undisturbed):
    inside, outside = scratch
    (outside / "filler").write_bytes(b"0" * (256 * 2**20 - 68 * 2**20))  # a save must leave 64 MiB
    flags = ["--output-dir", str(inside / "run")]
    job = site.train("full", *flags, nodes=1, options=["--nodelist=node1"]).wait("FAILED")
    assert job.log.count("refused: disk full") == 1 and "launched again" not in job.log
    (outside / "filler").unlink()
    again = site.train("full", *flags, nodes=1, options=["--nodelist=node1"]).wait()
    run = site.launch_of("full", again)
    run = type(run)(outside / "run", run.codes, run.logs)
    assert_same_curve(run, undisturbed)
    assert weight_difference(run, undisturbed) <= WEIGHTS
