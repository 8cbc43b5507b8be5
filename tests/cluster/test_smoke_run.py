"""Run slurm/smoke.sh on two nodes: one line per check, and a failure that names its fix."""

CHECKS = (
    "requeue", "devices", "bf16", "versions", "all-reduce", "shared disk", "scratch", "cache",
    "train under ZeRO-2", "kill", "resume", "evaluate",
)  # fmt: skip


def test_a_site_that_will_do(site):
    job = site.submit("smoke.sh", options=["--nodes=2"]).wait()
    found = [line.split(":")[0] for line in job.log.splitlines() if line.startswith(("pass  ", "FAIL  "))]
    assert found == [f"pass  {check}" for check in CHECKS], job.log
    assert "2 ranks on 2 nodes, gloo" in job.log and "this site is ready" in job.log


def test_a_site_without_requeue_gpus_that_nobody_sees_and_no_scratch_fail_with_a_cure(site):
    options = ["--gpus-per-node=1", "--no-requeue"]
    job = site.submit("smoke.sh", "--checks-only", options=options, ZEROTUNE_SCRATCH="/proc/nowhere")
    job.wait("FAILED")
    failed = [line for line in job.log.splitlines() if line.startswith("FAIL")]
    assert [line.split(":")[0] for line in failed] == ["FAIL  requeue", "FAIL  devices", "FAIL  scratch"]
    assert "Requeue=0; jobs do not resume by themselves here: submit the same line again" in failed[0]
    assert "SLURM gave GPUs on node1 and torch" in failed[1] and "slurm/hook.sh" in failed[1]
    assert "name a writable folder by ZEROTUNE_SCRATCH in slurm/site.env" in failed[2]
