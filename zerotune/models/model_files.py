"""What tells the files of a model from another version of them."""

import hashlib
import json
from pathlib import Path

BLOCK = 2**20
# So many blocks of a large file are hashed, evenly spaced: enough to tell another training step, fast enough for 14 GB.
NUM_BLOCKS = 16


def model_identity(name: str, revision: str | None) -> str:
    """The hub commit of a model, or a hash of a folder's files; for an adapter with its base's.

    Files up to 16 MiB count whole, larger ones by 16 blocks of 1 MiB and their size.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"commit {hub_commit(name, revision)}"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(NUM_BLOCKS):
                file.seek(max(block * BLOCK, block * (size - BLOCK) // (NUM_BLOCKS - 1)))
                digest.update(file.read(BLOCK))
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        described = json.loads(adapter.read_text())
        base = model_identity(described["base_model_name_or_path"], described.get("revision"))
        digest.update(base.encode())
    return digest.hexdigest()


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub model's cached files belong to, None when none is cached."""
    from huggingface_hub import try_to_load_from_cache

    for filename in ("config.json", "adapter_config.json"):
        path = try_to_load_from_cache(name, filename, revision=revision or "main")
        if isinstance(path, str):
            return Path(path).parent.name
    return None
