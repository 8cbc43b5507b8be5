"""The files of a model, in a folder or on the hub: how to find them, identify them, and check that they are complete.

Does not import torch, since login nodes use it.
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge
from typing_extensions import TypedDict

from zerotune.errors import BrokenMachine, Refused, listed
from zerotune.files import file_record, first_damage, nearest_entry, read_json, update_by_blocks
from zerotune.records import FileRecord, check_record
from zerotune.run.hub_connection import is_offline_on_request, stay_offline_without_network
from zerotune.settings.groups import ModelSettings

LFS_POINTER = b"version https://git-lfs"
ADAPTER_KINDS = ("LORA", "IA3")
WEIGHT_ENDS = (".safetensors", ".bin")
# In an adapter's final/: the folder with the config.json of the model with its head, which has labels and pad id.
CONFIG_FOLDER = "config"
# Files that a model or tokenizer may be read from.
_MODEL_FILES = ("vocab.txt", "merges.txt")
_MODEL_ENDS = (".json", ".safetensors", ".bin", ".model", ".jinja", ".tiktoken", ".codes", ".py")


def find_file(name: str | Path, filename: str, revision: str | None) -> str | None:
    """Return the path of one file of a folder or hub id; None if it does not exist (offline: is not in the cache).

    Raises:
        BrokenMachine: the hub did not say whether there is such a file, and is not known to be offline.
        OSError: there is no such model.
    """
    if os.path.isdir(name):
        path = os.path.join(name, filename)
        return path if os.path.isfile(path) else None
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    stay_offline_without_network()
    try:
        return hf_hub_download(name, filename, revision=revision)
    except LocalEntryNotFoundError as error:
        # whether the hub once said that there is no such file
        is_known = try_to_load_from_cache(name, filename, revision=revision or "main") is not None
        if is_known or constants.HF_HUB_OFFLINE:
            return None
        raise BrokenMachine(
            f"cannot tell whether {name} has a file {filename}: the hub cannot be reached; start again, or set "
            "HF_HUB_OFFLINE=1 if the whole model is in the cache"
        ) from error
    except EntryNotFoundError:
        return None


def read_record(name: str, revision: str | None) -> dict | None:
    """Return task.json of a final/ folder or hub id; None for a model without one or with another tool's."""
    path = find_file(name, "task.json", revision)
    record = read_json(Path(path)) if path else {}
    if "base_model" not in record:
        return None
    check_record(record, TaskRecord, path, "restore it, or make final/ again from the run's checkpoints")
    problem = _prompt_problem(record) or _label_problem(record, _config_file(name, revision))
    if problem:
        raise Refused(f"{path} is damaged ({problem}): restore it, or make final/ again from the run's checkpoints")
    return record


def _config_file(name: str, revision: str | None) -> str | None:
    """Return the path of a model's config.json, or of an adapter's, None where it has none."""
    places = ("config.json", f"{CONFIG_FOLDER}/config.json")
    return next((path for place in places if (path := find_file(name, place, revision))), None)


class WeightIndex(TypedDict):
    """model.safetensors.index.json: the file of each weight."""

    weight_map: dict[str, str]


class AdapterRecord(TypedDict):
    """adapter_config.json, as far as zerotune reads it; base_model_name_or_path is checked elsewhere."""

    revision: NotRequired[str | None]
    peft_type: NotRequired[str | None]


class ColumnsRecord(TypedDict):
    """task.json's entry about the columns of the rows, as the flags of train/classify.py named them."""

    text_column: str | None
    label_column: str | None
    glue: str | None
    label_separator: str | None


class TaskRecord(TypedDict):
    """The task.json of a final/ folder, as far as an evaluation relies on it."""

    task: str
    head: Literal["classify", "generate", "span"]
    prompt: dict[str, Any] | None
    chat: NotRequired[dict[str, Any]]
    labels: list[str] | None
    max_length: Annotated[int, Ge(1)]
    truncation: NotRequired[Literal["head", "head-and-tail"]]
    thresholds: dict[str, float | int | None] | None
    method: Literal["full", "lora", "qlora"]
    base_model: str
    base_revision: str | None
    max_new_tokens: NotRequired[Annotated[int, Ge(1)]]
    doc_stride: NotRequired[Annotated[int, Ge(0)]]
    max_answer_length: NotRequired[Annotated[int, Ge(1)]]
    n_best: NotRequired[Annotated[int, Ge(1)]]
    files: dict[str, FileRecord]
    columns: NotRequired[ColumnsRecord | None]
    pair_columns: NotRequired[list[str] | None]


def _prompt_problem(record: dict) -> str | None:
    """Return why the labels or the prompt of a task.json cannot be used; None where they can."""
    labels, prompt = record["labels"], record["prompt"]
    if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels)):
        return f"labels is {labels}, wanted two or more different names"
    if record["head"] != "generate":
        return None if prompt is None else "prompt is given, and only a generator has one"
    if prompt is None or prompt.get("format") not in ("plain", "chat"):
        return "prompt.format is missing, wanted 'plain' or 'chat'"
    if labels is None:
        return None
    template, words = prompt.get("template"), prompt.get("label_words")
    if not (isinstance(template, str) and template.count("{text}") == 1):
        return f"prompt.template is {template!r}, wanted a text with {{text}} in one place"
    usable = isinstance(words, list) and all(isinstance(word, str) and word.strip() for word in words)
    if not usable or len(set(words)) != len(labels) or len(words) != len(labels):
        return f"prompt.label_words is {words!r}, wanted a different word for each of {listed(labels)}"
    return None


class LabelNames(TypedDict):
    """config.json, as far as it names a classifier's outputs."""

    id2label: NotRequired[dict[str, str]]


def _label_problem(record: dict, config: str | None) -> str | None:
    """Return how a classifier's labels differ from the outputs that its config.json names; None where they do not."""
    if record["head"] != "classify":
        return None
    if record["labels"] is None:
        return "labels is None, wanted a classifier's"
    if config is None:
        return None
    names = read_json(Path(config), LabelNames, "copy it again").get("id2label")
    if names is not None and sorted(names.values()) != sorted(record["labels"]):
        return f"labels is {record['labels']}, and config.json beside it names {listed(names.values())}"
    return None


def generator_record(model: ModelSettings) -> dict | None:
    """Return task.json of a model that was tuned to write its answers, None for any other."""
    record = read_record(model.name, model.revision)
    return record if record is not None and record.get("head") == "generate" else None


def adapter_base(name: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """Return name or folder, and hub revision, of the model that an adapter belongs to; None for a whole model.

    A final/ that was moved together with its base still finds it, by the relative path in task.json.

    Raises:
        Refused: adapter_config.json is damaged or names no model.
    """
    path = find_file(name, "adapter_config.json", revision)
    if path is None:
        return None
    config = read_json(Path(path), AdapterRecord, "copy it again")
    base = config.get("base_model_name_or_path")
    if not (isinstance(base, str) and base):
        raise Refused(f"{path} has base_model_name_or_path {base!r}: wanted the model that the adapter was trained on")
    if os.path.isdir(name):
        base = _local_base(name, base)
    if os.path.isdir(base) and os.path.isfile(os.path.join(base, "adapter_config.json")):
        what = "itself" if os.path.samefile(base, os.path.dirname(path)) else f"{base}, which is an adapter too"
        raise Refused(f"{path} names {what} as its base model: wanted the model that the adapter was trained on")
    return base, config.get("revision")


def _local_base(folder: str | Path, base: str) -> str:
    """Return the path of an adapter's base if it is a local folder; else its name as given.

    For zerotune's own adapters the path in task.json is tried first: it is relative to the folder, so that both can be
    moved together. Users may correct it (task.json is not hashed as other files are), also to a hub id.
    """
    record = Path(folder) / "task.json"
    recorded = read_json(record).get("base_model") if record.is_file() else None
    for place in (recorded, base):
        if isinstance(place, str) and os.path.isdir(os.path.join(folder, place)):
            return place if os.path.isabs(place) else os.path.realpath(os.path.join(folder, place))
    return recorded if isinstance(recorded, str) and is_hub_id(recorded) else base


def check_adapter(name: str, revision: str | None) -> None:
    """Refuse an adapter of an unsupported kind, such as prompt tuning, which acts outside the layers."""
    path = find_file(name, "adapter_config.json", revision)
    kind = read_json(Path(path), AdapterRecord, "copy it again").get("peft_type") if path else None
    if path and kind not in ADAPTER_KINDS:
        raise Refused(
            f"{name} is an adapter of type {kind}, and zerotune runs {' and '.join(ADAPTER_KINDS)}: tune one of these, "
            "or give a whole model"
        )


def file_records(folder: Path) -> dict[str, dict]:
    """Flush the files that an evaluation reads from a folder to the disk, and return their sizes and sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("task.json", "README.md"))
    return {path.relative_to(folder).as_posix(): file_record(path) for path in files}


def check_final(name: str | Path) -> None:
    """Refuse a final/ folder whose files are not those that its run wrote; reads all of them."""
    record = read_record(name, None) if os.path.isdir(name) else None
    if record is None:
        return
    files = record["files"]
    if not any(file.endswith(".safetensors") for file in files):
        raise Refused(f"{Path(name) / 'task.json'} is damaged (files names no weights): restore it")
    damage = first_damage(Path(name), files)
    if damage:
        file, problem = damage
        raise Refused(
            f"{Path(name) / file} is damaged ({problem}): copy the folder again, or delete it and start the run's "
            "command again, which makes it from the checkpoints"
        )


def model_identity(name: str, revision: str | None) -> str:
    """Return the hub commit of a model, or a hash of the model's files in a folder.

    An adapter's includes its base's. Files up to 16 MiB are hashed whole, larger ones by their size and 16 blocks of
    1 MiB.

    Raises:
        Refused: an adapter does not name its base model.
    """
    folder = Path(name)
    if not folder.is_dir():
        snapshot, base = cached_snapshot(name, revision), adapter_base(name, revision)
        return f"commit {snapshot and snapshot.name}" + (f" of an adapter of {model_identity(*base)}" if base else "")
    digest = hashlib.sha256()
    files = [*folder.iterdir(), folder / CONFIG_FOLDER / "config.json"]
    for path in sorted(path for path in files if path.is_file() and _is_model_file(path.name)):
        digest.update(os.fsencode(path.name) + f" {path.stat().st_size}\n".encode())
        update_by_blocks(digest, path)
    base = adapter_base(folder)
    if base is not None:
        digest.update(model_identity(*base).encode())
    return digest.hexdigest()


def _is_model_file(name: str) -> bool:
    """Return whether a file may be part of a model; predictions beside it are not."""
    if name.startswith(".") or name.endswith(".partial.json"):
        return False
    return name in _MODEL_FILES or name.endswith(_MODEL_ENDS)


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, of a model or a data set."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def final_to_publish(run: Path) -> Path:
    """Return a run folder's final/, given either of the two. Raises Refused if there is none."""
    if not run.is_dir():
        meant = nearest_entry(run, Path.is_dir)
        raise Refused(f"RUN must be a run folder or its final/: there is no folder {run}{meant}")
    final = run / "final" if (run / "final").is_dir() else run
    if read_record(str(final), None) is None:
        way_out = "wait for the run to finish" if (run / "run.json").is_file() else "name a run that is finished"
        raise Refused(f"RUN must be a run folder that has a final/: {run} has none; {way_out}")
    return final


def missing_folder(name: str, flag: str = "--model", most_parts: int = 2) -> Refused | None:
    """Return the refusal of a name that is a path but no folder; None for a name that the hub may know.

    A path begins with ".", "/" or "~", has more parts than a hub id, or lies in an existing folder.

    Args:
        flag: the flag that was given the name.
        most_parts: of a hub id: 2 for ORG/NAME, 3 for a data set's ORG/NAME/CONFIGURATION.
    """
    path = Path(name).expanduser()
    parts = name.rstrip("/").split("/")
    if name.startswith(("https://huggingface.co/", "https://hf.co/")):
        hub_id = "/".join([part for part in parts[3:] if part != "datasets"][:2])
        return Refused(f"{flag} must be a hub id or a folder, not an address: give {hub_id}")
    if not (
        name.startswith((".", "/", "~")) or len(parts) > most_parts or (len(parts) == 2 and os.path.isdir(parts[0]))
    ):
        return None
    if path.is_file():
        return Refused(f"{flag} must be a folder or a hub id: {name} is a file; give the folder it is in")
    meant = f" (did you mean {str(path)!r}?)" if path.is_dir() else nearest_entry(path, Path.is_dir)
    of_what = " of a model or a run" if flag == "--model" else ""
    return Refused(f"no such folder: {flag} {name}{meant}; give the folder{of_what}, or a hub id, ORG/NAME")


def no_hub() -> str:
    """Return why the hub was not asked or did not answer, as the middle of a message."""
    if not is_offline_on_request():
        return "the hub cannot be reached"
    variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    return f"{variable} is set, so the hub is not asked"


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model's cached files, which is named after their commit; None if none is cached."""
    from huggingface_hub import try_to_load_from_cache

    for filename in ("config.json", "adapter_config.json") if is_hub_id(name) else ():
        path = try_to_load_from_cache(name, filename, revision=revision or "main")
        if isinstance(path, str):
            return Path(path).parent
    return None


def check_weight_files(name: str) -> None:
    """Raise Refused if a model folder lacks weights or they are cut short; reads only headers. A hub id passes."""
    if not os.path.isdir(name):
        return
    files = sorted(file for file in os.listdir(name) if file.endswith(WEIGHT_ENDS))
    wanted = set(files)
    if index := find_file(name, "model.safetensors.index.json", None):
        wanted = set(read_json(Path(index), WeightIndex, "copy it again")["weight_map"].values())
    elif base := adapter_base(name):
        wanted = {"adapter_model.safetensors"}
        check_weight_files(base[0])
    if not files or wanted - set(files):
        missing = ", ".join(sorted(wanted - set(files))[:4]) or "model.safetensors"
        raise Refused(f"no weights could be read for --model {name}: it lacks {missing}; copy the whole folder")
    for file in files:
        _check_weight_file(os.path.join(name, file))


def _check_weight_file(path: str) -> None:
    """Raise Refused for a file that cannot be read, is a Git LFS pointer, or has a damaged header."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise Refused(
            f"{path} cannot be read ({error.strerror}): check its links and permissions, or copy it again"
        ) from error
    if is_pointer:
        raise Refused(f"{path} is a Git LFS pointer, not weights: run `git lfs pull` there")
    if path.endswith(".safetensors"):
        try:
            with safe_open(path, "pt") as weights:
                kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise Refused(f"{path} is damaged ({error}): copy it again") from error
        # bitsandbytes keeps packed weights as integers, with their scales beside them
        packed = any(name.endswith((".absmax", ".SCB")) for name in kinds)
        for name, kind in kinds.items():
            if name.endswith((".weight", ".bias")) and not packed and not kind.startswith(("F", "BF")):
                raise Refused(f"{path} has {name} as {kind}: wanted floating-point numbers; copy it again")
