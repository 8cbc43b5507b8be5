"""Make a model, rows and a warm launcher for the script tests; nothing here needs ../shared."""

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launching import FEW_TOKENS, Launch, WarmServer


@dataclass
class Workplace:
    """Files that all script tests read, and methods to run scripts on them."""

    folder: Path
    environment: dict[str, str]
    server: WarmServer
    finished: dict[str, Launch] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """Return the folder of a tiny random Llama."""
        return self.folder / "llama"

    @property
    def train_file(self) -> Path:
        return self.folder / "train.tsv"

    @property
    def test_file(self) -> Path:
        return self.folder / "test.tsv"

    def train_flags(self, name: str, *more) -> list:
        """Return flags of train/sst2.py: 8 logged float32 steps of an epoch, one of a single row. Later flags win."""
        return [
            *("--model", self.model, "--train-file", self.train_file, "--test-file", self.test_file),
            *("--limit-train", 113, "--limit-eval", 48, "--batch-size", 16, "--tokens-per-device", FEW_TOKENS),
            *("--max-steps", 8, "--log-every", 1, "--learning-rate", 1e-3, "--precision", "fp32"),
            *("--base-eval", "none", "--output-dir", self.folder / name, *more),
        ]

    def train(self, name: str, *more, world: int = 1, expect: int = 0, **disturbance) -> Launch:
        """Run train/sst2.py to its end, and check every rank's exit status."""
        job = self.server.start(
            "train/sst2.py", self.train_flags(name, *more), self.folder / name, world=world, **disturbance
        )
        ended = job.wait()
        assert set(ended.codes) == {expect}, f"{ended.codes}\n{ended.text()}"
        return ended

    def train_once(self, name: str, *more, world: int = 1) -> Launch:
        """Return a finished run that several tests share."""
        if name not in self.finished:
            self.finished[name] = self.train(name, *more, world=world)
        return self.finished[name]

    def evaluate(self, name: str, *flags, world: int = 1, expect: int = 0) -> Launch:
        """Run eval/sst2.py to its end in float32."""
        more = ["--precision", "fp32", "--output-dir", self.folder / name, *flags]
        ended = self.server.start("eval/sst2.py", more, self.folder / name, world=world).wait()
        assert set(ended.codes) == {expect}, f"{ended.codes}\n{ended.text()}"
        return ended


@contextmanager
def open_workplace(folder: Path):
    """Open a workplace in a folder, with its server running."""
    from zerotune.models.tiny import tiny_causal_model
    from zerotune.tasks.sample import review_lines, sample_rows

    tiny_causal_model(folder / "llama", review_lines)
    for name, num_rows, seed in (("train.tsv", 600, 11), ("test.tsv", 120, 12)):
        lines = [f"{text}\t{label}\n" for text, label in sample_rows(num_rows, seed)]
        (folder / name).write_text("sentence\tlabel\n" + "".join(lines))
    environment = {
        **os.environ,
        "ZEROTUNE_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",  # several processes share few cores
        "DS_ACCELERATOR": "cpu",  # the server imports DeepSpeed before a script can choose
        "HF_HUB_OFFLINE": "1",
    }
    server = WarmServer(environment)
    try:
        yield Workplace(folder, environment, server)
    finally:
        server.stop()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    with open_workplace(tmp_path_factory.mktemp("scripts")) as opened:
        yield opened
