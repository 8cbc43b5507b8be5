"""Test the manifest of items for offline jobs: which commit is kept, what is whole, what is missing and why."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zerotune.cluster import prefetch
from zerotune.cluster.jobs import items_of, read_flags
from zerotune.cluster.prefetch import Item
from zerotune.errors import Refused
from zerotune.files import file_record

pytestmark = pytest.mark.usefixtures("own_cache")


def fetched(root: Path, revision="c" * 40, content=b"{}", asked=None):
    """Make a model as prefetch leaves it: its file and the manifest."""
    path = root / "hub/models--org--a/snapshots" / revision / "config.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    entry = {
        "kind": "model",
        "name": "org/a",
        "asked": asked,
        "revision": revision,
        "files": {str(path.relative_to(root)): file_record(path)},
    }
    (root / prefetch.MANIFEST).write_text(json.dumps({"model org/a": entry}))
    point_at(root, revision)
    return path


def point_at(root: Path, commit: str, name="main") -> None:
    """Write the hub client's record of the commit of a branch or tag."""
    reference = root / "hub/models--org--a/refs" / name
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)


def test_two_revisions_of_a_model_stand_side_by_side_and_the_latest_is_another(own_cache):
    path = fetched(own_cache, asked="v1")
    point_at(own_cache, "c" * 40, "v1")
    latest, v1, commit = Item("model", "org/a"), Item("model", "org/a", "v1"), Item("model", "org/a", "c" * 40)
    assert prefetch.missing_items([latest, v1, commit]).keys() == {latest}
    assert prefetch.listed_items() == [v1]
    (path.parent / "model.safetensors").write_bytes(b"")
    assert prefetch.missing_items([latest]) == {}  # another tool put it there


def test_a_branch_that_has_moved_since_is_missing_and_comes_back(own_cache, monkeypatch):
    path, item = fetched(own_cache), Item("model", "org/a")
    other = path.parent.with_name("d" * 40)
    shutil.copytree(path.parent, other)
    point_at(own_cache, other.name)
    assert prefetch.missing_items([item])[item] == "main was cccccccccccc when fetched and is dddddddddddd now"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, revision, **patterns: str(path.parent))
    prefetch.fetch(item)
    assert prefetch.missing_items([item]) == {}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "without its weights"),
        ({"model.safetensors": ""}, None),
        ({"adapter_model.safetensors": ""}, None),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "one", "b": "two"}}', "one": ""},
            "without its weights",
        ),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "one", "b": "two"}}', "one": "", "two": ""}, None),
    ],
)
def test_a_model_in_the_cache_is_there_with_its_weights(own_cache, files, why):
    path, item = fetched(own_cache), Item("model", "org/a")
    (own_cache / prefetch.MANIFEST).unlink()
    for name, content in files.items():
        (path.parent / name).write_text(content)
    assert prefetch.missing_items([item]).get(item) == why


def test_what_the_manifest_lists_is_measured_and_hashed(own_cache):
    path, item = fetched(own_cache), Item("model", "org/a")
    assert prefetch.missing_items([item, Item("model", "org/a", "c" * 40)], whole=True) == {}
    assert prefetch.missing_items([Item("model", "org/a", "v2")]) == {Item("model", "org/a", "v2"): "never fetched"}
    path.write_bytes(b"[]")
    assert prefetch.missing_items([item]) == {}
    assert "has changed since" in prefetch.missing_items([item], whole=True)[item]
    path.write_bytes(b"{} ")
    assert "has 3 bytes, not 2" in prefetch.missing_items([item])[item]
    path.unlink()
    assert "is gone" in prefetch.missing_items([item])[item]


def test_a_hub_adapter_wants_its_base_too(own_cache):
    path = fetched(own_cache)
    path.rename(path.with_name("adapter_config.json")).write_text('{"base_model_name_or_path": "org/base"}')
    assert items_of(read_flags("eval/sst2.py", ["--model", "org/a"]))[:2] == [
        Item("model", "org/a"),
        Item("model", "org/base"),
    ]


def test_a_kept_commit_is_asked_for_again(own_cache, monkeypatch):
    fetched(own_cache, asked="main")
    asked = []

    def fetch_model(item, revision):
        asked.append(revision)
        return revision or "d" * 40, [own_cache / "hub/models--org--a/snapshots" / ("c" * 40) / "config.json"]

    monkeypatch.setattr(prefetch, "_fetch_model", fetch_model)
    prefetch.fetch(Item("model", "org/a"))
    prefetch.fetch(Item("model", "org/a", "main"))
    prefetch.fetch(Item("model", "org/a", "v2"))
    prefetch.fetch(Item("model", "org/a"), update=True)
    assert asked == ["c" * 40, "c" * 40, "v2", None]
    assert {name: entry["revision"][:2] for name, entry in prefetch.read_manifest().items()} == {
        "model org/a": "dd",
        "model org/a at main": "cc",
        "model org/a at v2": "v2",
    }


def test_fetches_at_the_same_time_are_all_listed(own_cache, monkeypatch):
    path = fetched(own_cache)
    read = prefetch.read_manifest

    def read_slowly():
        manifest = read()
        time.sleep(0.05)
        return manifest

    monkeypatch.setattr(prefetch, "read_manifest", read_slowly)
    monkeypatch.setattr(prefetch, "_fetch_model", lambda item, revision: ("c" * 40, [path]))
    items = [Item("model", f"org/{name}") for name in "bcdefg"]
    with ThreadPoolExecutor(len(items)) as threads:
        list(threads.map(prefetch.fetch, items))
    assert read().keys() == {"model org/a", *map(str, items)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "it is"),
        ('{"model org/a": 7}', "model org/a is 7, wanted a valid dictionary"),
        ('{"model org/a": {"kind": "model", "name": "org/a", "asked": null, "revision": "c"}}', "files is missing"),
    ],
)
def test_a_manifest_of_another_form(own_cache, content, words):
    own_cache.mkdir()
    (own_cache / prefetch.MANIFEST).write_text(content)
    with pytest.raises(Refused, match=rf"{prefetch.MANIFEST} is damaged \(.*{words}.*: delete it and fetch again"):
        prefetch.listed_items()


def test_wordnet_comes_from_debians_files(own_cache, monkeypatch, tmp_path):
    for name in ("data.noun", "index.noun", "noun.exc"):
        (tmp_path / "debian").mkdir(exist_ok=True)
        (tmp_path / "debian" / name).write_text(name)
    monkeypatch.setattr(prefetch, "DEBIAN_FOLDER", tmp_path / "debian")
    entry = prefetch.fetch(Item("wordnet"))
    assert sorted(entry["files"]) == [
        f"nltk_data/corpora/wordnet/{name}" for name in ("data.noun", "index.noun", "noun.exc")
    ]
    assert prefetch.missing_items([Item("wordnet")], whole=True) == {}
