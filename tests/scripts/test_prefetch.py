"""Run slurm/prefetch.sh against a fake hub, over HTTP with the real client; afterwards the command needs no hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub

REPOSITORY = Path(__file__).parents[2]
ROWS = {
    kind: ("sentence,label\n" + "".join(f"a {kind} film number {n},{n % 2}\n" for n in range(40))).encode()
    for kind in ("train", "validation")
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    from zerotune.models.tiny import tiny_causal_model
    from zerotune.tasks.sample import review_lines

    model = tmp_path_factory.mktemp("hub") / "llama"
    tiny_causal_model(model, review_lines)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    repositories = {
        ("models", "org/tiny"): files | {"original/params.pth": b"never asked for"},
        ("datasets", "org/rows"): {f"{kind}.csv": rows for kind, rows in ROWS.items()},
    }
    with FakeHub(repositories) as hub:
        yield hub


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SLURM_"))},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "ZEROTUNE_PYTHON": sys.executable,
        "ZEROTUNE_CACHE": str(home / "cache"),
    }


def run(environment, *command, status=0):
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_nothing_to_fetch_is_refused(environment):
    said = run(environment, "bash", "slurm/prefetch.sh", status=2)
    assert "name what to fetch: a train or eval command, --model, --dataset or --wordnet; or --verify" in said


RUN = ["--model", "org/tiny", "--dataset", "org/rows"]


@pytest.mark.slow
def test_what_a_command_line_needs_is_fetched_and_then_the_hub_is_not_asked(hub, environment, tmp_path):
    before = run(environment, "bash", "slurm/sst2.sh", *RUN, status=2)
    assert "model org/tiny (never fetched); dataset org/rows (never fetched)" in before
    said = run(environment, "bash", "slurm/prefetch.sh", "train/sst2.py", *RUN)
    assert (
        f"commit {hub.commit('models', 'org/tiny')}" in said and f"commit {hub.commit('datasets', 'org/rows')}" in said
    )
    assert not [line for line in hub.requests if "original/params.pth" in line]
    manifest = json.loads((Path(environment["HF_HOME"]) / "zerotune-manifest.json").read_text())
    assert {"model org/tiny", "dataset org/rows"} == manifest.keys()
    assert all(len(file["sha256"]) == 64 for entry in manifest.values() for file in entry["files"].values())
    # the job runs offline, and sends no request
    hub.requests.clear()
    run(environment, "bash", "slurm/sst2.sh", *RUN)
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    more = ["--max-steps", "1", "--base-eval", "none", "--output-dir", str(tmp_path / "run")]
    run(offline, sys.executable, "train/sst2.py", *RUN, *more)
    assert json.loads((tmp_path / "run/state.json").read_text())["state"] == "finished"
    assert hub.requests == []


@pytest.mark.slow
def test_what_was_fetched_can_be_verified_and_keeps_its_commit(hub, environment):
    line = run(environment, "bash", "slurm/prefetch.sh", "--model", "org/tiny")
    first = hub.commit("models", "org/tiny")
    assert first in line
    hub.repositories["models", "org/tiny"]["README.json"] = b"{}"  # the hub gets a new commit
    assert f"commit {first}" in run(environment, "bash", "slurm/prefetch.sh", "--model", "org/tiny")
    newest = hub.commit("models", "org/tiny")
    assert newest != first
    assert f"commit {newest}" in run(environment, "bash", "slurm/prefetch.sh", "--model", "org/tiny", "--update")
    assert "are as they were fetched" in run(environment, "bash", "slurm/prefetch.sh", "--verify")
    (weights,) = Path(environment["HF_HOME"]).glob(f"hub/models--org--tiny/snapshots/{newest}/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    damaged = run(environment, "bash", "slurm/prefetch.sh", "--verify", status=2)
    assert "has changed since it was fetched" in damaged and "bash slurm/prefetch.sh --model org/tiny" in damaged


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "org/absent"], "model org/absent: no such repository or revision on the hub"),
        (["--model", "org/tiny@v9"], "model org/tiny at v9: no such repository or revision on the hub"),
    ],
)
def test_what_the_hub_lacks_is_refused(environment, flags, words):
    assert words in run(environment, "bash", "slurm/prefetch.sh", *flags, status=2)


def test_a_hub_that_cannot_be_reached_is_refused(environment):
    unreachable = environment | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    found = run(unreachable, "bash", "slurm/prefetch.sh", "--model", "org/tiny2", status=2)
    assert "model org/tiny2 cannot be fetched" in found and "run this where there is a network" in found
