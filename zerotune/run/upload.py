"""Uploading final/ to the Hugging Face hub."""

from pathlib import Path

from zerotune.errors import Refused


def check_upload(name: str) -> None:
    """Refuse a --push-to-hub that cannot work: offline, without a token, or not the name of a repository."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise Refused(f"--push-to-hub {name} is no ORG/NAME: {error}") from None
    if constants.HF_HUB_OFFLINE:
        raise Refused("--push-to-hub needs the hub and HF_HUB_OFFLINE is set: unset it, or leave --push-to-hub out")
    if get_token() is None:
        raise Refused("--push-to-hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN")


def upload_final(final: Path, name: str, report: Path) -> None:
    """Upload a run's final/ into a private repository, which is created where it does not exist.

    Raises:
        Refused: the upload failed; the line says that the run is finished.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().create_repo(name, exist_ok=True, private=True)
        HfApi().upload_folder(repo_id=name, folder_path=final)
    except (OSError, HfHubHTTPError.__bases__[0]) as error:  # the HTTPError of the client that it uses
        raise Refused(
            f"--push-to-hub {name} failed ({str(error).splitlines()[0]}); the run is finished, see {report}: start the "
            f"same command again, or `hf upload {name} {final}`"
        ) from None
