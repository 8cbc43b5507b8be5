"""Kill a run on a two-node cluster at random moments, again and again, and count the lost steps.

    python tests/cluster/random_kills.py --kills 50 --seed 0 --output runs/kills.json

Plain, ZeRO-2 and ZeRO-3 take turns. Each time a fresh run of 24 steps (a checkpoint after every fourth) is killed once
while its libraries load, in a step, in a save or in its last evaluation: one rank, all ranks, or a node with everything
on it. The run must then finish by itself, with the losses and final weights of an undisturbed run, and may repeat no
more steps than lie between two checkpoints.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "scripts")]

from comparing import CURVE, WEIGHTS, differences, newest_step, weight_difference  # noqa: E402
from local_cluster import LocalCluster, why_not  # noqa: E402
from site_of_tests import Site, make_site  # noqa: E402
from waiting import wait_until  # noqa: E402

KINDS = {
    "plain": [],
    "ZeRO-2": ["--deepspeed", "ds_configs/zero2.json"],
    "ZeRO-3": ["--deepspeed", "ds_configs/zero3.json"],
}
VICTIMS = ("a rank", "all ranks", "a node")
NUM_STEPS, CHECKPOINT_EVERY = 24, 4
# Approximate time for loading, and for the work after the last step.
SECONDS_TO_LOAD, SECONDS_AFTER = 8.0, 3.0
# In seconds; the defaults are half an hour and two minutes.
TIMEOUTS = {"ZEROTUNE_COLLECTIVE_TIMEOUT": "20", "ZEROTUNE_END_TIMEOUT": "10"}
RANK = "train/sst2.py --model llama"


def ranks(cluster: LocalCluster) -> list[int]:
    """Return the process ids of everything that a job has started for its ranks, on all nodes."""
    return [pid for node in cluster.names for pid in cluster.processes(node, RANK)]


def wait_for_moment(site: Site, name: str, job, rng: random.Random) -> str:
    """Wait for a random moment in the run, and describe it."""
    wait_until(lambda: ranks(site.cluster) or job_is_over(site, job), "the ranks have started")
    step = rng.randint(0, NUM_STEPS)
    if step == 0:
        seconds = rng.uniform(0, SECONDS_TO_LOAD)
        time.sleep(seconds)
        return f"{seconds:.1f} s after its start"
    wait_until(lambda: site.steps_logged(name) >= step or job_is_over(site, job), f"{name} is at step {step}")
    seconds = rng.uniform(0, SECONDS_AFTER if step == NUM_STEPS else 0.3)
    time.sleep(seconds)
    return f"{seconds:.2f} s after step {step}"


def job_is_over(site: Site, job) -> bool:
    return site.cluster.job(job.number).get("JobState") not in ("PENDING", "RUNNING", "COMPLETING")


def strike(cluster: LocalCluster, victim: str, rng: random.Random) -> bool:
    """Kill the victim. Returns whether there was a process left to kill."""
    found = ranks(cluster)
    if not found:
        return False
    if victim == "a node":
        name = rng.choice(cluster.names)
        cluster.crash(name)
        time.sleep(1)
        cluster.boot(name)
        return True
    for pid in [rng.choice(found)] if victim == "a rank" else found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return True


def one_kill(site: Site, number: int, reference, rng: random.Random) -> dict | None:
    """Start, kill, wait, compare. Returns None if the run was over before it could be killed."""
    kind, victim, name = list(KINDS)[number % len(KINDS)], rng.choice(VICTIMS), f"kill-{number}"
    shutil.rmtree(site.run_folder(name), ignore_errors=True)
    job = site.train(name, *KINDS[kind], **TIMEOUTS)
    moment = wait_for_moment(site, name, job, rng)
    if not strike(site.cluster, victim, rng):
        job.wait()
        return None
    logged, saved = site.steps_logged(name), newest_step(site.launch_of(name, job)) or 0
    found = {"kind": kind, "victim": victim, "moment": moment, "step": logged, "saved": saved, "lost": None}
    try:
        job.wait(seconds=400)
        run = site.launch_of(name, job)
        worst = max(differences(run, reference).values())
        weights = weight_difference(run, reference)
    except (AssertionError, OSError) as error:
        return found | {"lost": str(error)}
    found |= {"curve": worst, "weights": weights, "steps_again": logged - saved}
    if worst > CURVE or weights > WEIGHTS:
        found["lost"] = "the numbers differ"
    elif logged - saved > CHECKPOINT_EVERY:
        found["lost"] = f"{logged - saved} steps"
    return found


def main(arguments: argparse.Namespace) -> int:
    if why_not():
        print(why_not())
        return 1
    folder = Path(tempfile.mkdtemp(prefix="zerotune-kills-"))
    rng, found = random.Random(arguments.seed), []
    with LocalCluster(folder / "slurm") as cluster:
        site = make_site(cluster, folder / "checkout")
        reference = site.launch_of("undisturbed", site.train("undisturbed", nodes=1).wait())
        while len(found) < arguments.kills:
            one = one_kill(site, len(found), reference, rng)
            if one is None:
                continue
            found.append(one)
            print(json.dumps(one), flush=True)
            if one["lost"] is None:
                shutil.rmtree(site.run_folder(f"kill-{len(found) - 1}"))
    lost = [one for one in found if one["lost"]]
    kinds, victims = Counter(one["kind"] for one in found), Counter(one["victim"] for one in found)
    print(f"{len(found)} kills ({dict(kinds)}; {dict(victims)}), lost: {len(lost)}")
    print(f"largest difference of a loss or norm {max(one.get('curve', 0) for one in found):.1e} (relative), ", end="")
    print(f"of a weight {max(one.get('weights', 0) for one in found):.1e}")
    print(f"steps done again: {sum(one.get('steps_again', 0) for one in found)}")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    if lost:
        print(f"kept for a look: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default %(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for what became of each")
    sys.exit(main(parser.parse_args()))
