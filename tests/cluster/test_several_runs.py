"""Test sbatch slurm/sst2.sh --seeds: an array with one run per task, and a final job, which is stopped once."""

import json


def test_an_array_of_seeds_and_a_job_that_adds_one_and_is_requeued(site, cluster):
    job = site.train("several", "--seeds", 0, 1, nodes=1, options=["--array=1-2"])
    states = [cluster.wait_for(f"{job.number}_{task}", seconds=240) for task in (1, 2)]
    logs = [(site.folder / f"runs/slurm/{one['JobId']}.log").read_text() for one in states]
    assert [one["JobState"] for one in states] == ["COMPLETED"] * 2, logs
    assert [f"runs/several/seed-{seed}: fresh" in log for seed, log in enumerate(logs)] == [True, True], logs
    assert any("values of 2 seeds" in log for log in logs), logs

    job = site.train("several", "--seeds", 0, 1, 2, nodes=2)
    site.wait_for_step("several/seed-2", 6)
    cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait()
    assert job.num_restarts == 1 and "slurm: SIGUSR1: the ranks are asked to save and stop" in job.log, job.log
    assert "run folder: runs/several/seed-2: resumed after step" in job.log and "seed-0: " not in job.log
    assert "values of 3 seeds" in job.log and "report: runs/several/report.html" in job.log
    summary = json.loads((site.run_folder("several") / "summary.json").read_text())
    assert [run["finished"] for run in summary["runs"]] == [True] * 3 and summary["settings"][0]["test"]
    assert not list((site.folder / "runs/slurm").glob(f"{job.number}.*.attempts"))
