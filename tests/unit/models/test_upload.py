"""Test uploads to a fake hub with the real client: files, card, and errors."""

import contextlib
import io
import json
import re
import shutil

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard, snapshot_download
from tiny_models import LABELS, model_copy, task_record, tuned_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from zerotune.errors import Refused
from zerotune.models.final_folder import save_final
from zerotune.models.model_files import check_final
from zerotune.models.upload import _content, check_run_upload, published_files, upload, upload_run
from zerotune.report.html import file_links
from zerotune.settings.groups import FlagRecord, RunSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Make a local base model with a card, in a folder whose name must not leave the machine."""
    folder = model_copy(tmp_path_factory.mktemp("secret-disk") / "llama")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Llama\n")
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Make a run for each method, with an evaluation and a page that name paths of this machine."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("full", "lora"):
        model, tokenizer = tuned_model(str(base), method)
        (folder / method / "final").mkdir(parents=True)
        save_final(model, tokenizer, folder / method / "final", task_record(labels=list(LABELS)))
        results = folder / method / "eval" / "base"
        results.mkdir(parents=True)
        (results / "metrics.json").write_text(json.dumps({"model": str(base), "prompt": "and/or {text}"}))
        (results / ".fingerprint.json").write_text("{}")
        (results / "predictions.jsonl").write_text('{"id": "a"}\n')
        (folder / method / "report.html").write_text(f"<p>--model {base} --output-dir {folder}/x/</p><p>a/b</p>")
    return folder


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    """Start a hub with the base model for this process's client, which does not wait between its attempts."""
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    with FakeHub({("models", "org/llama"): files}) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        yield hub


def uploaded(hub, name="org/new"):
    return hub.repositories["models", name]


def test_a_run_is_uploaded_without_paths_of_this_machine_and_loads_from_there(runs, base, hub, tmp_path, capsys):
    run = runs / "full"
    upload(run, "org/new", "org/llama")
    files = uploaded(hub)
    assert {"README.md", "model.safetensors", "config.json", "task.json", "report.html"} < set(files)
    assert {"eval/base/metrics.json", "eval/base/predictions.jsonl"} < set(files)
    assert not any("/." in f"/{name}" for name in files)
    for name, content in files.items():
        for secret in (base.parent.name, str(runs), str(tmp_path), "/tmp"):
            assert secret.encode() not in content, (name, secret)
    assert files["report.html"] == b"<p>--model llama --output-dir x</p><p>a/b</p>"
    assert json.loads(files["eval/base/metrics.json"]) == {"model": "llama", "prompt": "and/or {text}"}
    assert "org/new" in hub.private and "(private; change that in its settings on the hub)" in capsys.readouterr().out
    folder = snapshot_download("org/new")
    check_final(folder)  # the hashes match the uploaded files
    model = AutoModelForSequenceClassification.from_pretrained("org/new", dtype="float32")
    assert model.config.id2label[0] == LABELS[0] and AutoTokenizer.from_pretrained("org/new").pad_token is not None


def test_files_of_the_users_own_stay_here(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "full", run)
    for name in ("final/predicted.csv", "eval/customers/run.json", "eval/customers/metrics.json", "eval/base/run.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    (run / "final" / "LICENSE").write_text("mine")
    files = published_files(run, "org/new", "org/llama")
    assert files.keys() - published_files(runs / "full", "org/new", "org/llama").keys() == {"LICENSE"}


def test_the_page_links_only_to_uploaded_files(runs, tmp_path):
    shutil.copytree(runs / "full", tmp_path / "run")
    for name in ("metrics.jsonl", "run.json"):
        (tmp_path / "run" / name).write_text("{}\n")
    pages = {"report.html": ("final/README.md", "eval/base/metrics.json", "metrics.jsonl", "run.json")}
    pages["eval/base/report.html"] = ("metrics.json", "run.json")
    for page, names in pages.items():
        (tmp_path / "run" / page).write_text(file_links((tmp_path / "run" / page).parent, names) or "none")
    files = published_files(tmp_path / "run", "org/new", "org/llama")
    links = '<a href="README.md">README.md</a> <a href="eval/base/metrics.json">eval/base/metrics.json</a>'
    assert files["report.html"].decode() == f'<p class="files">{links} metrics.jsonl run.json</p>'
    assert files["eval/base/report.html"].decode() == '<p class="files"><a href="metrics.json">metrics.json</a></p>'


def test_labels_and_prompts_that_look_like_paths_stay_as_they_are(tmp_path):
    labels = {"labels": ["/r/pics", "/x/pics"], "id2label": {"0": "/r/pics"}, "columns": {"text_column": "/a/b"}}
    record = labels | {"prompt": {"template": "/no_think {text}"}, "base_model": "/disk/llama"}
    (tmp_path / "task.json").write_text(json.dumps(record))
    assert json.loads(_content(tmp_path / "task.json", tmp_path)) == record | {"base_model": "llama"}


def test_the_card_is_read_by_the_hub_s_own_parser(runs, base, hub):
    local = ModelCard.load(runs / "full" / "final" / "README.md").data
    assert local.base_model is None and local.license == "other" and local.license_link is None
    upload(runs / "full", "org/new", "org/llama", is_public=True)
    assert not hub.private
    card = ModelCard(uploaded(hub)["README.md"].decode())
    assert card.data.base_model == "org/llama" and card.data["base_model_relation"] == "finetune"
    assert card.data.license == "other" and card.data.license_name == "own"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-classification"
    assert "All weights of `org/llama`" in card.text and 'snapshot_download("org/new")' in card.text


def test_an_adapter_names_its_base_on_the_hub_and_its_card_predicts_from_there(runs, base, hub, tmp_path):
    with pytest.raises(Refused, match=r"is an adapter for .*llama, a folder: name it as it is on the hub, with --base"):
        upload(runs / "lora", "org/new")
    assert ("models", "org/new") not in hub.repositories
    upload(runs / "lora", "org/new", "org/llama")
    files = uploaded(hub)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/llama"
    assert json.loads(files["task.json"])["base_model"] == "org/llama"
    assert not any(base.parent.name.encode() in content for content in files.values())
    data = ModelCard(files["README.md"].decode()).data
    assert data["base_model_relation"] == "adapter" and data.library_name == "peft" and data.license == "other"
    printed = []
    for text in (files["README.md"].decode(), (runs / "lora" / "final" / "README.md").read_text()):
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        code = code.replace('folder = "."', f"folder = {str(runs / 'lora' / 'final')!r}")
        with contextlib.redirect_stdout(io.StringIO()) as output, torch.random.fork_rng():
            exec(code, {})
        printed.append(output.getvalue())
    assert printed[0] == printed[1] and LABELS[0] in printed[0]


def test_a_license_that_no_card_tells_is_not_claimed(runs, hub, tmp_path):
    hub.repositories["models", "org/llama"].pop("README.md")
    shutil.copytree(runs / "full", tmp_path / "run")
    readme = tmp_path / "run" / "final" / "README.md"
    card = ModelCard.load(readme)
    card.data.license = card.data.license_name = card.data.license_link = None
    card.save(readme)
    upload(tmp_path / "run", "org/new", "org/llama")
    card = ModelCard(uploaded(hub)["README.md"].decode())
    assert card.data.license is None and card.data.base_model == "org/llama"


def test_an_existing_repository_keeps_its_other_files_and_unlike_weights_refuse(runs, hub, capsys):
    hub.repositories["models", "org/new"] = {"notes.txt": b"kept", "README.md": b"old"}
    upload(runs / "full", "org/new")
    assert uploaded(hub)["notes.txt"] == b"kept" and uploaded(hub)["README.md"] != b"old"
    assert "(public)" in capsys.readouterr().out
    with pytest.raises(Refused, match=r"org/new holds other weights \(model\.safetensors\)"):
        upload(runs / "lora", "org/new", "org/llama")


@pytest.mark.parametrize("name", ["theirs/new", "org/read-only"])
def test_no_permission_is_said_in_one_line(name, runs, hub):
    hub.repositories["models", "org/read-only"] = {}
    hub.read_only |= {"theirs", "org/read-only"}
    with pytest.raises(Refused, match=rf"the upload to {name} failed \(.*403.*python eval/publish\.py .*full {name}"):
        upload(runs / "full", name)
    assert not hub.repositories.get(("models", name))


def test_a_broken_connection_is_tried_again_and_an_upload_that_broke_resumes(runs, hub):
    hub.num_broken = 1
    upload(runs / "full", "org/first")
    hub.objects.clear()
    hub.num_broken = 100
    with pytest.raises(Refused, match=r"the upload to org/new failed .*what has arrived is not sent again"):
        upload(runs / "full", "org/new")
    assert uploaded(hub) == {} and not hub.objects
    hub.num_broken = 0
    upload(runs / "full", "org/new")
    assert uploaded(hub)["model.safetensors"] == uploaded(hub, "org/first")["model.safetensors"]
    sent = sum(line.startswith("PUT") for line in hub.requests)
    del hub.repositories["models", "org/new"]["model.safetensors"]  # the weights arrived, the commit was lost
    upload(runs / "full", "org/new")
    assert sum(line.startswith("PUT") for line in hub.requests) == sent and "model.safetensors" in uploaded(hub)


def test_a_file_that_names_a_folder_of_this_machine_is_not_sent(runs, hub, tmp_path):
    shutil.copytree(runs / "full", tmp_path / "run")
    predictions = tmp_path / "run" / "eval" / "base" / "predictions.jsonl"
    predictions.write_text(json.dumps({"id": f"{tmp_path}/run/x"}))
    with pytest.raises(Refused, match=r"predictions\.jsonl names .*run, a folder of this machine"):
        upload(tmp_path / "run", "org/new")
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    with pytest.raises(Refused, match=r"config\.json is damaged"):
        upload(tmp_path / "run", "org/new")
    with pytest.raises(Refused, match="has none; name a run that is finished"):
        upload(tmp_path, "org/new")
    assert ("models", "org/new") not in hub.repositories


def test_a_train_script_uploads_its_finished_run_and_refuses_early(runs, base, hub):
    settings = RunSettings(runs / "full", FlagRecord({}), push_to_hub="org/new")
    upload_run(settings)
    assert "model.safetensors" in uploaded(hub)
    check_run_upload("org/new", "org/llama", "lora")
    check_run_upload("org/new", str(base), "full")
    with pytest.raises(Refused, match=r"an adapter is of no use without its base.*--base-model ORG/NAME"):
        check_run_upload("org/new", str(base), "lora")
