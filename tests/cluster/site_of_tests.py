"""A checkout on the disk that a test cluster's nodes share, and jobs submitted from it as a user would."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from comparing import WEIGHTS, assert_same_curve, weight_difference
from launching import Launch
from local_cluster import LocalCluster
from waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
# Launches are slower than a user's: each imports its libraries on cores that all nodes and other tests share.
SECONDS_TO_FINISH = 240
ZERO2 = ["--deepspeed", "ds_configs/zero2.json"]


@dataclass(frozen=True)
class Site:
    """A folder from which jobs are submitted, with the model and rows that they train on."""

    cluster: LocalCluster
    folder: Path
    environment: dict[str, str]

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def train_flags(self, name: str, *more) -> list[str]:
        """Return flags of train/sst2.py: 24 logged float32 steps, a checkpoint after every fourth. Later flags win."""
        files = ["--model", "llama", "--train-file", "train.tsv", "--test-file", "test.tsv"]
        few = ["--limit-train", 384, "--limit-eval", 48, "--batch-size", 16, "--tokens-per-device", 96]
        steps = ["--max-steps", 24, "--log-every", 1, "--checkpoint-every", 4, "--eval-every", 12]
        rest = ["--learning-rate", 1e-3, "--precision", "fp32", "--base-eval", "none", "--output-dir", f"runs/{name}"]
        return [str(word) for word in (*files, *few, *steps, *rest, *more)]

    def submit(self, script: str, *flags, options=(), **environment: str) -> "Job":
        """Run sbatch OPTIONS slurm/SCRIPT FLAGS, with more environment variables."""
        command = ["sbatch", "--parsable", *options, f"slurm/{script}", *flags]
        printed = self.call(*command, **environment)
        return Job(self, int(printed.strip().split(";")[0]))

    def call(self, *command, **environment: str) -> str:
        """Run a command in the checkout and return its output."""
        return self.cluster.call(*map(str, command), cwd=self.folder, environment={**self.environment, **environment})

    def train(self, name: str, *more, nodes: int = 2, options=(), **environment: str) -> "Job":
        """Run sbatch slurm/sst2.sh on `nodes` nodes, writing to runs/NAME."""
        asked = [f"--nodes={nodes}", *options]
        return self.submit("sst2.sh", *self.train_flags(name, *more), options=asked, **environment)

    def launch_of(self, name: str, job: "Job") -> Launch:
        """Return an ended run in the form that tests/scripts/comparing.py takes."""
        return Launch(self.run_folder(name), (0,), (job.log_path,))

    def steps_logged(self, name: str) -> int:
        """Return the last step that a run has logged; 0 before the first."""
        path = self.run_folder(name) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for_step(self, name: str, step: int, seconds: float = 120) -> None:
        """Wait until a run has logged a step."""
        wait_until(lambda: self.steps_logged(name) >= step, f"{name} is at step {step}", seconds)


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    site: Site
    number: int

    @property
    def log_path(self) -> Path:
        return self.site.folder / "runs" / "slurm" / f"{self.number}.log"

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def wait(self, expect: str = "COMPLETED", seconds: float = SECONDS_TO_FINISH) -> "Job":
        """Wait for the job's end; its state must be the expected one."""
        try:
            state = self.site.cluster.wait_for(self.number, seconds=seconds)["JobState"]
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        assert state == expect, f"job {self.number} is {state}\n{self.log}"
        return self

    @property
    def num_restarts(self) -> int:
        return int(self.site.cluster.job(self.number)["Restarts"])

    def wait_for_log(self, words: str, seconds: float = 120) -> None:
        """Wait until the log contains the words."""
        try:
            wait_until(lambda: words in self.log, f"{words!r} in the log of job {self.number}", seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log}") from None


def assert_undisturbed(site: Site, name: str, job: Job, undisturbed: Launch) -> None:
    """Assert that a run is finished, with the losses and weights of the undisturbed one."""
    run = site.launch_of(name, job)
    assert run.read_json("state.json") == {"state": "finished", "reason": None}
    assert_same_curve(run, undisturbed)
    assert weight_difference(run, undisturbed) <= WEIGHTS


def make_site(cluster: LocalCluster, folder: Path) -> Site:
    """Make a checkout with a tiny Llama and generated rows; it links the code, but has its own slurm/ and runs/."""
    from zerotune.models.tiny import tiny_causal_model
    from zerotune.tasks.sample import review_lines, sample_rows

    folder.mkdir(parents=True)
    for name in ("zerotune", "train", "eval", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    own = shutil.ignore_patterns("site.env", "hook.sh")
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm", ignore=own)
    (folder / "runs" / "slurm").mkdir(parents=True)
    tiny_causal_model(folder / "llama", review_lines)
    for name, num_rows, seed in (("train.tsv", 600, 11), ("test.tsv", 120, 12)):
        lines = [f"{text}\t{label}\n" for text, label in sample_rows(num_rows, seed)]
        (folder / name).write_text("sentence\tlabel\n" + "".join(lines))
    foreign = ("SLURM_", "SBATCH_", "SRUN_", "ZEROTUNE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment = kept | {
        "ZEROTUNE_PYTHON": sys.executable,
        "ZEROTUNE_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",  # the nodes share few cores
        "DS_ACCELERATOR": "cpu",
    }
    return Site(cluster, folder, environment)
