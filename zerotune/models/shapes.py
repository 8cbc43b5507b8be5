"""Configs of models that can be planned without any of their files: zerotune/models/shapes.toml."""

import os
import tomllib
from functools import cache
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from zerotune.errors import Refused
from zerotune.models.model_files import find_file, missing_folder
from zerotune.models.pretrained import check_revision, read_config


@cache
def shapes() -> dict[str, dict]:
    """Return {short name: {"ids", "parameters", "config"}} of the models whose shapes are known."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def known_shape(name: str) -> str | None:
    """Return the short name of a known shape, given that or one of its hub ids, in upper or lower case; else None."""
    wanted = name.casefold()
    for short, shape in shapes().items():
        if wanted in (short.casefold(), *(each.casefold() for each in shape["ids"])):
            return short
    return None


def shape_config(short: str) -> PretrainedConfig:
    """Return the config of a known shape, by its short name."""
    shape = shapes()[short]
    config = AutoConfig.for_model(**shape["config"], pad_token_id=0, use_cache=False)
    config.architectures = None
    config._attn_implementation = "eager"  # --attention decides
    return config


def config_to_plan(name: str, revision: str | None) -> tuple[PretrainedConfig, str | None]:
    """Return a model's config for a plan, and the name of the known shape that it comes from; None if from the model.

    Only config.json is read, from a folder, the hub or its cache.

    Raises:
        Refused: the config cannot be read and the shape is not known, or a folder is given a revision.
    """
    check_revision(name, revision)
    short = known_shape(name)
    if short and "/" not in name and not os.path.isdir(name):
        return shape_config(short), short
    try:
        return read_config(name, revision), None
    except Refused as refusal:
        if short and not os.path.isdir(name):
            return shape_config(short), short
        if os.path.isdir(name) or missing_folder(name):
            raise
        raise Refused(f"{refusal} (a plan also knows, without a file: {', '.join(shapes())})") from refusal


def downloadable_name(name: str) -> str:
    """Return the hub id for a known shape's short name, and any other name unchanged."""
    short = known_shape(name)
    return shapes()[short]["ids"][0] if short and "/" not in name and not os.path.isdir(name) else name


def has_tokenizer(name: str, revision: str | None) -> bool:
    """Return whether there may be a tokenizer: a folder has its files, or the name is no shape's short name."""
    if os.path.isdir(name):
        return any(find_file(name, file, revision) for file in ("tokenizer.json", "tokenizer_config.json"))
    return "/" in name or known_shape(name) is None
