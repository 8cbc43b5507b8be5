"""Ask a job to stop in every way that a cluster does: the ranks agree, save, and the job resumes by itself."""

import time

from comparing import newest_step
from site_of_tests import ZERO2, assert_undisturbed
from waiting import wait_until

# One step and one save on a machine whose cores are all busy. Measured on an idle one: 0.6 s.
SECONDS_TO_SAVE = 15


def test_sigusr1_saves_within_a_step_and_requeues(site, cluster, undisturbed):
    """`--signal=B:USR1@300` sends the job script this signal before the time limit."""
    job = site.train("usr1", *ZERO2)
    site.wait_for_step("usr1", 6)
    asked = time.monotonic()
    cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    state = site.run_folder("usr1") / "state.json"
    wait_until(lambda: '"preempted"' in state.read_text(), "the run is preempted")
    seconds = time.monotonic() - asked
    saved, logged = newest_step(site.launch_of("usr1", job)), site.steps_logged("usr1")
    print(f"from the signal to saved: {seconds:.1f} s")  # shown by pytest -rP
    assert seconds < SECONDS_TO_SAVE and saved == logged < 24
    job.wait()
    assert job.num_restarts == 1 and "requeued (SIGUSR1)" in job.log
    assert f"run folder: runs/usr1: resumed after step {saved} (was preempted, stopped by SIGUSR1" in job.log
    assert_undisturbed(site, "usr1", job, undisturbed)


def test_requeue_by_an_administrator(site, cluster, undisturbed):
    """SLURM sends SIGTERM to every process of the job at once, including launchers, and SIGKILL 30 s later."""
    job = site.train("requeued")
    site.wait_for_step("requeued", 6)
    cluster.call("scontrol", "requeue", str(job.number))
    job.wait_for_log("SLURM ends this job")
    saved = newest_step(site.launch_of("requeued", job))
    job.wait()
    assert job.num_restarts == 1 and f"resumes after step {saved}" in job.log
    assert_undisturbed(site, "requeued", job, undisturbed)


def test_a_stop_while_the_hook_runs_and_one_while_the_libraries_load(site, cluster, undisturbed):
    hook = site.folder / "slurm" / "hook.sh"
    hook.write_text('[ -n "${SLURM_STEP_ID:-}${SLURM_RESTART_COUNT:-}" ] || { echo modules are loaded; sleep 3; }\n')
    try:
        job = site.train("early", nodes=1)
        job.wait_for_log("modules are loaded")
        cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
        job.wait_for_log("requeued (SIGUSR1)")
    finally:
        hook.unlink()
    cluster.wait_for(job.number, "RUNNING")
    job.wait_for_log("start 2: train/sst2.py")
    wait_until(lambda: cluster.processes("node1", "train/sst2.py --model llama"), "the launcher runs")
    cluster.call("scancel", "--full", "--signal=USR1", str(job.number))  # to every process, Python still importing
    wait_until(lambda: job.log.count("requeued (SIGUSR1)") == 2, "requeued again")
    assert newest_step(site.launch_of("early", job)) in (None, 1)
    job.wait()
    assert job.num_restarts == 2
    assert_undisturbed(site, "early", job, undisturbed)


def test_a_signal_to_the_ranks_alone_on_a_site_that_forbids_to_requeue(site, cluster, undisturbed):
    """In a preemption, SLURM's first SIGTERM goes to the steps, not to the job script."""
    job = site.train("ranks", nodes=1, options=["--no-requeue"])
    site.wait_for_step("ranks", 6)
    cluster.call("scancel", "--signal=TERM", str(job.number))
    job.wait("FAILED")
    assert "this site forbids requeueing: submit the same command again" in job.log
    assert "launched again" not in job.log
    again = site.train("ranks", nodes=1).wait()
    assert "(was preempted, stopped by SIGTERM after step" in again.log
    assert_undisturbed(site, "ranks", again, undisturbed)


def test_a_cancelled_job_is_saved_stays_cancelled_and_goes_on_with_fewer_nodes(site, cluster, undisturbed):
    """The resuming job skips the newest checkpoint, which is torn."""
    flags = [*ZERO2, "--keep-checkpoints", 2]
    job = site.train("cancelled", *flags)
    site.wait_for_step("cancelled", 6)
    cluster.call("scancel", str(job.number))
    job.wait("CANCELLED")
    run = site.launch_of("cancelled", job)
    assert run.read_json("state.json")["state"] == "preempted" and job.num_restarts == 0
    saved = newest_step(run)
    files = [path for path in (run.folder / "checkpoints" / f"step-{saved:08d}").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    again = site.train("cancelled", *flags, nodes=1).wait()
    assert f"step-{saved:08d} is skipped: " in again.log and "world size: 1" in again.log
    assert_undisturbed(site, "cancelled", again, undisturbed)


def test_the_time_limit_is_seen_coming(site, cluster):
    """The limit is two minutes and the signal comes 80 s before it; SLURM checks every few seconds."""
    options = ["--time=2", "--signal=B:USR1@80"]
    long = [
        "--max-steps",
        50_000,
        "--epochs",
        5000,
        "--checkpoint-every",
        50_000,
        "--eval-every",
        5000,
        "--log-every",
        500,
    ]
    job = site.train("timed", *long, nodes=1, options=options)
    job.wait_for_log("requeued (SIGUSR1)")
    saved = newest_step(site.launch_of("timed", job))
    assert saved is not None and f"stopped by SIGUSR1 after step {saved}" in job.log
    cluster.call("scancel", str(job.number))
    job.wait("CANCELLED")
