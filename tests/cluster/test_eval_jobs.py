"""Test slurm/eval.sh and slurm/chain.sh: arrays that skip finished evaluations, and one comparison at the end."""

import json
import re

from waiting import wait_until

FLAGS = "--test-file test.tsv --precision fp32"


def numbers_said(text):
    return [int(number) for number in re.findall(r"(?:training|evaluations|comparison) (\d+)", text)]


def test_a_chain_trains_evaluates_and_compares(site, cluster):
    (site.folder / "chain.txt").write_text(
        f"runs/chained/final sst2 0 0 {FLAGS}\nllama sst2 0 0 {FLAGS}\nllama sst2 2 1 {FLAGS} --train-file train.tsv\n"
    )
    said = site.call("bash", "slurm/chain.sh", "chain.txt", "slurm/sst2.sh", *site.train_flags("chained"))
    *_, comparison = numbers_said(said)
    cluster.wait_for(comparison, seconds=300)
    log = (site.folder / f"runs/slurm/{comparison}.log").read_text()
    assert cluster.job(comparison)["JobState"] == "COMPLETED", log
    report = site.folder / "runs/eval/chain/compare-sst2/report.html"
    assert "sst2: 3 evaluations compared in runs/eval/chain/compare-sst2/report.html" in log and report.exists()
    folders = json.loads(report.with_name("comparison.json").read_text())["evaluations"]
    assert [one["metrics"]["shots"] for one in folders] == [0, 0, 2]
    # the same list again launches nothing
    again = site.call("bash", "slurm/eval.sh", "chain.txt")
    assert "all of chain.txt is done" in again and "3 evaluations compared" in again


def test_the_first_task_of_an_array_is_requeued_alone(site, cluster):
    """The first task has the same job number as the whole array."""
    (site.folder / "array.txt").write_text(f"llama sst2 0 0 {FLAGS}\nllama sst2 0 1 {FLAGS}\n")
    job = site.submit("eval.sh", "array.txt").wait()
    array, comparison = numbers_said(job.log)
    logs = [site.folder / f"runs/slurm/{array}_{task}.log" for task in (1, 2)]
    wait_until(lambda: all(log.exists() and "run folder:" in log.read_text() for log in logs), "both have begun")
    (first,) = (task for task in (1, 2) if cluster.job(f"{array}_{task}")["JobId"] == str(array))
    cluster.call("scancel", "--batch", "--signal=USR1", f"{array}_{first}")
    cluster.wait_for(comparison, seconds=200)
    restarts = {task: int(cluster.job(f"{array}_{task}")["Restarts"]) for task in (1, 2)}
    assert restarts == {first: 1, 3 - first: 0}, [log.read_text() for log in logs]
    assert cluster.job(comparison)["JobState"] == "COMPLETED"


def test_what_failed_is_named_and_started_again(site, cluster):
    (site.folder / "broken.txt").write_text(f"llama sst2 0 0 {FLAGS}\nabsent sst2 0 0 {FLAGS}\n")
    job = site.submit("eval.sh", "broken.txt").wait()
    _, comparison = numbers_said(job.log)
    cluster.wait_for(comparison, seconds=200)
    log = (site.folder / f"runs/slurm/{comparison}.log").read_text()
    assert cluster.job(comparison)["JobState"] == "FAILED"
    assert "1 of 2 evaluations are not done: broken.txt line 2 (never started); submit the list again" in log
    (site.folder / "absent").symlink_to("llama")
    job = site.submit("eval.sh", "broken.txt").wait()
    assert "(lines 2 of broken.txt: " in job.log
    _, comparison = numbers_said(job.log)
    cluster.wait_for(comparison, seconds=200)
    assert cluster.job(comparison)["JobState"] == "COMPLETED"
