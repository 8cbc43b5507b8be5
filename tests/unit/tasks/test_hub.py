"""Test reading the hub without a network: labels become names, and failures to load are refused with a way out."""

import pytest

from zerotune.errors import Refused
from zerotune.tasks.hub import read_hub


def hub_that(monkeypatch, outcome):
    """Replace load_dataset by `outcome`: an exception to raise, or a data set to return."""
    import datasets

    def load_dataset(name, configuration, split, revision):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_class_labels_become_names(monkeypatch):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    table = Dataset.from_dict({"sentence": ["warm ", "dull", "new"], "label": [0, 1, -1]}, features=features)
    hub_that(monkeypatch, table)
    source = read_hub("someone/reviews", "train", "v1")
    assert [row["label"] for row in source.rows] == ["positive", "negative", None]
    assert source.record["revision"] == "v1"
    assert source.record["rows"] == 3
    assert source.where(1) == "someone/reviews[train] row 2"
    assert read_hub("someone/reviews", "train").record["sha256"] == source.record["sha256"]


def test_hub_refusals_say_what_to_do(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    broken_transport = HfHubHTTPError.__bases__[0]("no route to host")
    cases = {
        "hf auth login": DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit the page …"),
        "https://huggingface.co/datasets/a/b": DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
        "no such data set on the hub at revision v1": DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
        "not in the local cache and HF_HUB_OFFLINE is set": ConnectionError("… (OfflineModeIsEnabled)"),
        "the hub cannot be reached": ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectTimeout)"),
        "cannot be loaded (no route to host)": broken_transport,
        "or draw the rows from train with --split": ValueError(
            "Unknown split \"test\". Should be one of ['train'].\nmore"
        ),
    }
    for message, error in cases.items():
        hub_that(monkeypatch, error)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1" if "Offline" in str(error) else "")
        with pytest.raises(Refused) as refusal:
            read_hub("a/b", "test", "v1")
        assert message in str(refusal.value)
        assert "--train-file" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    for error in (DatasetNotFoundError("Dataset './a' doesn't exist"), ConnectionError("…")):
        hub_that(monkeypatch, error)
        with pytest.raises(Refused, match=r"^no such folder: --dataset \./nowhere; give the folder, or a hub id"):
            read_hub("./nowhere", "test")
