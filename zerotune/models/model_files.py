"""The files of a model, in a folder or on the hub: which there are, what identifies them, and whether they are whole.

Imports no torch, for login nodes.
"""

import hashlib
import os
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json

BLOCK = 2**20
# So many blocks of a large file are hashed, evenly spaced: enough to tell another training step, fast enough for 14 GB.
NUM_BLOCKS = 16


def find_file(name: str | Path, filename: str, revision: str | None) -> str | None:
    """Return the path of one file of a folder or hub id, None when it has no such file."""
    if os.path.isdir(name):
        path = os.path.join(name, filename)
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(name, filename, revision=revision)
    except EntryNotFoundError:
        return None


def read_record(name: str, revision: str | None) -> dict | None:
    """Return task.json of a final/ folder or hub id; None for a model without one or with another tool's."""
    path = find_file(name, "task.json", revision)
    record = read_json(Path(path)) if path else {}
    return record if "base_model" in record else None


def adapter_base(name: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """Return name or folder, and hub revision, of the model that an adapter belongs to; None for a whole model.

    Raises:
        Refused: adapter_config.json is damaged or names no model.
    """
    path = find_file(name, "adapter_config.json", revision)
    if path is None:
        return None
    config = read_json(Path(path))
    base = config.get("base_model_name_or_path")
    if not (isinstance(base, str) and base):
        raise Refused(f"{path} has base_model_name_or_path {base!r}: wanted the model that the adapter was trained on")
    return base, config.get("revision")


def model_identity(name: str, revision: str | None) -> str:
    """Return the hub commit of a model, or a hash of a folder's files; an adapter's includes its base's.

    Files up to 16 MiB count whole, larger ones by 16 blocks of 1 MiB and their size.

    Raises:
        Refused: an adapter does not say to which model it belongs.
    """
    folder = Path(name)
    if not folder.is_dir():
        snapshot = cached_snapshot(name, revision)
        return f"commit {snapshot and snapshot.name}"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(NUM_BLOCKS):
                file.seek(max(block * BLOCK, block * (size - BLOCK) // (NUM_BLOCKS - 1)))
                digest.update(file.read(BLOCK))
    base = adapter_base(folder)
    if base is not None:
        digest.update(model_identity(*base).encode())
    return digest.hexdigest()


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, of a model or a data set."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


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
    from safetensors import SafetensorError, safe_open

    if not os.path.isdir(name):
        return
    files = sorted(file for file in os.listdir(name) if file.endswith((".safetensors", ".bin")))
    wanted = set(files)
    if index := find_file(name, "model.safetensors.index.json", None):
        wanted = set(read_json(Path(index)).get("weight_map", {}).values())
    elif base := adapter_base(name):
        wanted = {"adapter_model.safetensors"}
        if os.path.isabs(base[0]) and not os.path.isdir(base[0]):
            raise Refused(
                f"the adapter {name} belongs to the model {base[0]}, which is not there: put it back, or correct "
                "base_model_name_or_path in adapter_config.json"
            )
        check_weight_files(base[0])
    if not files or wanted - set(files):
        missing = ", ".join(sorted(wanted - set(files))[:4]) or "model.safetensors"
        raise Refused(f"no weights could be read for --model {name}: it lacks {missing}; copy the whole folder")
    for path in (os.path.join(name, file) for file in files if file.endswith(".safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise Refused(f"{path} is damaged ({error}): copy it again") from error
