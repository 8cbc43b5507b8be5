"""Test slurm/sst2.sh: first start, finished run, one and several nodes, with and without SLURM's GPUs, offline."""

import json

import pytest
from comparing import WEIGHTS, assert_same_curve, weight_difference


def first_lines(job):
    lines = [
        line for line in job.log.splitlines() if line.startswith(("slurm: job", "nodes:", "devices:", "world size:"))
    ]
    return lines + [line for line in job.log.splitlines() if line.startswith(("ZeRO stage:", "run folder:"))]


def test_two_nodes_train_as_one_process_does_and_call_nobody(site, cluster, undisturbed):
    """The nodes have no route out, and every attempt to reach an outside address or name is counted."""
    before = {node: cluster.no_route_count(node) for node in cluster.names}
    job = site.train("two-nodes").wait()
    assert first_lines(job)[1:] == [
        "nodes: 2 (node[1-2])",
        "devices: CPU and 1 process a node",
        "world size: 2",
        "ZeRO stage: none",
        "run folder: runs/two-nodes: fresh",
    ]
    run = site.launch_of("two-nodes", job)
    assert_same_curve(run, undisturbed)
    assert weight_difference(run, undisturbed) <= WEIGHTS
    assert run.read_json("run.json")["world"]["num_processes"] == 2
    assert {node: cluster.no_route_count(node) for node in cluster.names} == before
    # check that an attempt is counted
    cluster.call("srun", "--nodelist=node1", "bash", "-c", "exec 3<>/dev/tcp/192.0.2.1/80 || true")
    assert cluster.no_route_count("node1") == before["node1"] + 1
    again = site.train("two-nodes").wait()
    assert "run folder: runs/two-nodes: finished" in again.log and "is finished; the report is" in again.log
    other = site.train("two-nodes", "--seed", 1, nodes=1).wait("FAILED")
    assert "--seed was 0, is 1" in other.log and other.log.count("refused: ") == 1


def test_gpus_that_slurm_gives_decide_the_number_of_ranks(site, undisturbed):
    """Each node has two empty device files: torch sees no GPU, and the four ranks train on the CPU, with ZeRO-3."""
    job = site.train("four-ranks", "--deepspeed", "ds_configs/zero3.json", options=["--gpus-per-node=2"]).wait()
    assert "WARNING: SLURM gave this job 2 GPUs on node1 and torch sees none" in job.log
    assert "devices: 2 GPUs and 2 processes a node\nworld size: 4\nZeRO stage: 3 (ds_configs/zero3.json)" in job.log
    run = site.launch_of("four-ranks", job)
    assert_same_curve(run, undisturbed)
    assert weight_difference(run, undisturbed) <= WEIGHTS


@pytest.mark.parametrize(
    ("script", "dataset"),
    [
        ("sst2.sh", "stanfordnlp/sst2"),
        ("imdb.sh", "stanfordnlp/imdb"),
        ("qa.sh", "rajpurkar/squad_v2"),
        ("classify.sh", "nyu-mll/glue/mrpc"),
    ],
)
def test_what_is_not_in_the_cache_ends_a_job_before_anything_is_launched(script, dataset, site):
    glue = ["--glue", "mrpc"] if script == "classify.sh" else []
    job = site.submit(script, "--model", "org/absent", *glue, options=["--nodes=2"]).wait("FAILED", seconds=60)
    assert "model org/absent (never fetched)" in job.log
    assert f"bash slurm/prefetch.sh --model org/absent --dataset {dataset}" in job.log
    assert job.log.splitlines()[-1].startswith("refused: ")


def test_site_settings_and_hook_are_read_on_every_node(site):
    (site.folder / "slurm" / "site.env").write_text("export ZEROTUNE_ATTEMPTS=1\n")
    (site.folder / "slurm" / "hook.sh").write_text(
        'false; echo "hook on $(hostname)$UNSET"\nIN_CONTAINER=(env IN_BOX=yes)\n'  # as module and conda do
    )
    try:
        # a launcher that only prints where it runs
        fake = site.folder / "python-that-tells"
        fake.write_text(
            '#!/bin/bash\ncase "$*" in *accelerate_cli*)\n'
            'echo "launched on $(hostname) in box: $IN_BOX: $*"; sleep 2; exit 1 ;; esac\n'
            f'exec {site.environment["ZEROTUNE_PYTHON"]} "$@"\n'
        )
        fake.chmod(0o755)
        job = site.train("hooked", ZEROTUNE_PYTHON=str(fake)).wait("FAILED", seconds=60)
    finally:
        (site.folder / "slurm" / "site.env").unlink()
        (site.folder / "slurm" / "hook.sh").unlink()
    for rank, node in enumerate(("node1", "node2")):
        assert f"hook on {node}" in job.log
        (launched,) = [line for line in job.log.splitlines() if line.startswith(f"launched on {node}")]
        assert "in box: yes" in launched and f"--machine_rank {rank}" in launched and "--num_processes 2" in launched
        assert f"--main_process_port {15000 + (8 * job.number + 1) % 15000}" in launched
    assert "1 starts in a row came no further than 0+0" in job.log


def test_a_start_that_comes_no_further_is_not_repeated_for_ever(site):
    fake = site.folder / "python-that-dies"
    fake.write_text(
        f'#!/bin/bash\ncase "$*" in *accelerate_cli*) exit 9 ;; esac\nexec {site.environment["ZEROTUNE_PYTHON"]} "$@"\n'
    )
    fake.chmod(0o755)
    job = site.train("dies", nodes=1, ZEROTUNE_PYTHON=str(fake)).wait("FAILED", seconds=60)
    assert job.log.count("launched again from the last checkpoint") == 2
    assert "3 starts in a row came no further than 0+0+0 (last status 9)" in job.log


def test_a_refusal_before_there_is_a_folder_ends_the_job(site):
    """It reaches the job script through --state-file, because the launchers turn its exit status into 1."""
    job = site.train("bad", "--max-length", 9999).wait("FAILED", seconds=120)
    assert not site.run_folder("bad").exists() and "launched again" not in job.log
    assert job.log.count("refused: --max-length 9999 is more than") == 1
    assert json.loads(job.log_path.with_suffix(".state.json").read_text())["state"] == "refused"
