"""Uploading a run to the Hugging Face hub: final/, report.html and eval/, without paths of this machine."""

import hashlib
import json
import os
import posixpath
import re
import shlex
from collections.abc import Collection
from html import unescape
from pathlib import Path
from urllib.parse import quote, unquote

from zerotune.errors import Refused, first_line
from zerotune.models.base_license import LICENSE_HEADING, base_license, hub_id
from zerotune.models.model_card import FOLDER_LINE, license_section, name_base
from zerotune.models.model_files import (
    WEIGHT_ENDS,
    adapter_base,
    check_final,
    final_to_publish,
    read_record,
)
from zerotune.run.hub_connection import is_offline_on_request, stay_offline_without_network
from zerotune.run.machine_paths import left_paths, without_paths
from zerotune.run.process import is_main_process, say
from zerotune.run.run_files import RESULT_FILES
from zerotune.settings.groups import RunSettings

# Texts of the tokenizer and of the items, which are never rewritten: uploaded as they are, or refused.
_UNCHANGED = ("tokenizer.json", "vocab.json", "predictions.json")
# Keys of labels, columns and prompts in the JSON files of a run.
_NO_PATHS = {"labels", "id2label", "label2id", "label_words", "label_names", "columns", "pair_columns", "prompt"}
_NO_PATHS |= {"template", "instruction", "text_column", "label_column", "label_separator"}
_LINK = re.compile(r'<a href="([^"]*)">(.*?)</a>')


def check_upload(name: str, what: str = "--push-to-hub") -> None:
    """Refuse an upload that cannot work: offline, without a token, or with a malformed repository name.

    Args:
        what: the argument that asks for the upload.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise Refused(f"{what} {name} is not of the form ORG/NAME: {error}") from None
    if is_offline_on_request():
        raise Refused(f"{what} {name} needs the hub and HF_HUB_OFFLINE is set: unset it, or upload later elsewhere")
    if get_token() is None:
        raise Refused(
            f"{what} {name} needs a token that may write: log in with `hf auth login`, or set HF_TOKEN; or upload "
            "later elsewhere, with `python eval/publish.py RUN ORG/NAME`"
        )
    stay_offline_without_network()
    if constants.HF_HUB_OFFLINE:
        raise Refused(f"{what} {name} needs the hub, which cannot be reached from here: upload later elsewhere")


def check_run_upload(name: str, model: str, method: str) -> None:
    """Refuse --push-to-hub of a run whose upload would fail at its end.

    Args:
        model, method: values of --model and --method.
    """
    check_upload(name)
    if method != "full" and hub_id(model) is None:
        raise Refused(
            f"--push-to-hub {name}: an adapter is of no use without its base, and {model} is a folder: give --model as "
            f"a hub id, or upload later with `python eval/publish.py RUN {name} --base-model ORG/NAME`"
        )


def upload_run(settings: RunSettings) -> None:
    """Upload a finished run if --push-to-hub is given, on rank 0. Raises Refused like `upload`."""
    if settings.push_to_hub and not settings.plan and is_main_process():
        check_upload(settings.push_to_hub)
        upload(settings.output_dir, settings.push_to_hub)


def upload(run: Path, name: str, base: str | None = None, is_public: bool = False) -> None:
    """Upload a run's model, report and evaluations, in one commit, into a repository that is created if it is missing.

    Files that the repository already has are not sent again.

    Args:
        run: a run folder, or only its model's folder.
        base: hub id of the base model, if the run was made from a folder.
        is_public: whether a new repository is public; else it is private.
    Raises:
        Refused: the folder is damaged, an adapter's base is not on the hub, a file names a folder of this machine, the
            repository holds other weights, or the upload failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    files = published_files(run, name, base)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True, private=not is_public)
        info = api.model_info(name)
        there = [file.rfilename for file in info.siblings or []]
        _refuse_other_weights(name, there, files)
        size = sum(operation.upload_info.size for operation in operations)
        say(f"uploading {len(files)} files, {size / 2**20:,.1f} MiB, to {name}")
        commit = api.create_commit(name, operations, commit_message=f"Upload {run.resolve().name}")
    # RuntimeError: of an LFS or Xet upload; ValueError: of refused front matter; the client's HTTPError: of the rest
    except (OSError, RuntimeError, ValueError, HfHubHTTPError.__bases__[0]) as error:
        if isinstance(error, Refused):
            raise
        while error.__cause__ is not None:
            error = error.__cause__
        reason = first_line(error)
        raise Refused(
            f"the upload to {name} failed ({reason}); nothing is lost here, and what has arrived is not sent again: "
            f"python eval/publish.py {shlex.quote(str(run))} {name}{f' --base-model {base}' if base else ''}"
            f"{' --public' if is_public else ''}"
        ) from None
    seen = "private; change that in its settings on the hub" if info.private else "public"
    say(f"uploaded: {commit.commit_url.partition('/commit/')[0]} ({seen})")


def published_files(run: Path, name: str, base: str | None = None) -> dict[str, Path | bytes]:
    """Return the files to upload of a run: path in the repository -> file, or content without paths of this machine.

    Raises:
        Refused: like `upload`, before anything is sent.
    """
    final = final_to_publish(run)
    record = read_record(str(final), None)
    if not (final / "README.md").is_file():
        raise Refused(f"{final} has no README.md: name a run folder that is finished")
    check_final(final)
    files = {place: final / place for place in sorted([*record["files"], "README.md", "task.json"])}
    files |= {path.name: path for path in sorted(final.glob("LICENSE*")) if path.is_file()}
    if final != run:
        wanted = [run / "eval" / part / name for part in ("base", "final") for name in (*RESULT_FILES, "report.html")]
        files |= {path.relative_to(run).as_posix(): path for path in [*wanted, run / "report.html"] if path.is_file()}
    contents: dict[str, Path | bytes] = {}
    for place, path in files.items():
        contents[place] = path if path.name.endswith(WEIGHT_ENDS) else _content(path, run)
        if path.suffix == ".html":
            contents[place] = _with_live_links(contents[place].decode(), place, files).encode()
    readme, base = _card(files["README.md"].read_text(encoding="utf-8"), final, record, name, base)
    contents["README.md"] = readme.encode()
    if "adapter_config.json" in files:
        settings = json.loads(contents["adapter_config.json"]) | {"base_model_name_or_path": base}
        contents["adapter_config.json"] = _as_json(settings)
    contents["task.json"] = _task(record, contents, base)
    for place, content in contents.items():
        text = _header(content) if isinstance(content, Path) else content
        if left := left_paths(text.decode(errors="replace"), run):
            raise Refused(
                f"{files[place]} names {left[0]}, a folder of this machine: remove it from the file, or the file from "
                "the folder, before you upload it"
            )
    return contents


def _content(path: Path, run: Path) -> bytes:
    """Return a file's content, with paths of this machine removed from settings and pages."""
    content = path.read_bytes()
    if path.suffix == ".html":
        return without_paths(content.decode(), run).encode()
    if path.suffix != ".json" or path.name in _UNCHANGED:
        return content
    value = json.loads(content)
    cleaned = _without_paths(value)
    return content if cleaned == value else _as_json(cleaned)


def _with_live_links(page: str, place: str, places: Collection[str]) -> str:
    """Return a page with the links to uploaded files, and only the text of the others.

    Args:
        place: of the page in the repository, where the files of final/ are at the top.
        places: of all uploaded files.
    """
    folder = posixpath.dirname(place)

    def link(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, unquote(unescape(found[1])))).removeprefix("final/")
        if target not in places:
            return found[2]
        address = quote(posixpath.relpath(target, folder or "."))
        return f'<a href="{address}">{address if found[2] == found[1] else found[2]}</a>'

    return _LINK.sub(link, page)


def _without_paths(value):
    """Return a JSON value with each string that is an absolute path, or one out of the folder, cut to its last name.

    What belongs to the user's data stays: a label or a prompt may begin with a slash."""
    if isinstance(value, dict):
        return {key: each if key in _NO_PATHS else _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    is_path = isinstance(value, str) and value.startswith(("/", "../", "~/")) and "\n" not in value
    return os.path.basename(value.rstrip("/")) if is_path else value


def _as_json(value) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _card(text: str, final: Path, record: dict, name: str, base: str | None) -> tuple[str, str | None]:
    """Return the card for the hub, and the base model's hub id, None if it is unknown.

    Its code loads the repository, and an adapter's base from the hub. A card without a license gets the base's.
    """
    from huggingface_hub import ModelCard

    card, is_adapter = ModelCard(text), record["method"] != "full"
    local = adapter_base(final)[0] if is_adapter else None
    known = hub_id(local) if local else None
    if base and known and base != known:
        raise Refused(f"--base-model {base}: {final} is an adapter for {known}, also on the hub: leave the flag out")
    base = base or card.data.base_model or known
    if is_adapter and base is None:
        raise Refused(
            f"{final} is an adapter for {local}, a folder: name it as it is on the hub, with --base-model ORG/NAME, or "
            "make a whole model with --merge"
        )
    if base:
        same = base == record["base_model"]
        found = {key: card.data.get(key) for key in ("license", "license_name", "license_link")}
        found = found if card.data.license else base_license(base, record["base_revision"] if same else None)
        if found and not card.data.license:
            name_base(card.data, base, is_adapter, found)
            card.text = card.text.partition(f"{LICENSE_HEADING}\n")[0] + license_section(card.data) + "\n"
        name_base(card.data, base, is_adapter, found)
        code = re.search(r'folder \+ "/(\.\.[^"]*)"', card.text)
        if is_adapter and code:  # task.json's own path may have been corrected since
            card.text = card.text.replace(code[0], json.dumps(base))
            card.text = card.text.replace(f"`{code[1]}`", f"`{base}`", 1)
        card.text = card.text.replace(f"`{record['base_model']}`", f"`{base}`", 1)
    imports = "from peft import" if "\nfrom peft import" in card.text else "from transformers import"
    card.text = card.text.replace(f"\n{imports}", f"\nfrom huggingface_hub import snapshot_download\n{imports}", 1)
    card.text = card.text.replace(FOLDER_LINE, f"folder = snapshot_download({json.dumps(name)})", 1)
    return str(card), base


def _task(record: dict, contents: dict[str, Path | bytes], base: str | None) -> bytes:
    """Return task.json with the base's name on the hub and the hashes of the files as they are uploaded."""
    hashes = dict(record["files"])
    for place in hashes:
        content = contents.get(place)
        if isinstance(content, bytes):
            hashes[place] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    named = {"base_model": base or record["base_model"]}
    return _as_json(_without_paths(record | named) | {"files": hashes})


def _header(path: Path) -> bytes:
    """Return the header of a safetensors file, which may hold any text; nothing for other weights."""
    if path.suffix != ".safetensors":
        return b""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _refuse_other_weights(name: str, there: list[str], files: dict) -> None:
    other = sorted(path for path in there if path.endswith(WEIGHT_ENDS) and path not in files and "/" not in path)
    if other:
        raise Refused(
            f"{name} holds other weights ({', '.join(other[:3])}), which a program would load beside these: name "
            "another repository, or delete them there"
        )
