"""Classifiers that give a text none, one or several labels: how their config says so, and which models are refused."""

from transformers import PretrainedConfig

from zerotune.errors import Refused
from zerotune.models.model_files import read_record
from zerotune.models.pretrained import answers_by_prompt, is_trained_classifier
from zerotune.settings.groups import ModelSettings

# transformers' name for such classifiers in config.json; pipeline() then takes a sigmoid of each logit.
PROBLEM_TYPE = "multi_label_classification"


def is_multi_label(config: PretrainedConfig) -> bool:
    """Return whether a checkpoint was published or tuned as a classifier that gives any number of labels."""
    return is_trained_classifier(config) and config.problem_type == PROBLEM_TYPE


def check_multi_label(model: ModelSettings, config: PretrainedConfig, multi_label: bool) -> None:
    """Refuse a classifier of one label per text with --multi-label, and one of several labels without it.

    If a published classifier's config says neither, the user's flag decides.
    """
    if not multi_label and is_multi_label(config):
        raise Refused(
            f"{model.name} gives a text any number of labels: train it with train/classify.py --multi-label, evaluate "
            "it with eval/classify.py"
        )
    if not multi_label or not is_trained_classifier(config) or is_multi_label(config):
        return
    if config.problem_type is not None or read_record(model.name, model.revision) is not None:
        raise Refused(
            f"--multi-label: {model.name} was trained to give a text exactly one label: leave the flag out, or train "
            "from its base model"
        )


def check_has_head(name: str, config: PretrainedConfig) -> None:
    """Refuse --multi-label for a causal model that answers by a prompt, which gives one label."""
    if answers_by_prompt(config):
        raise Refused(
            f"--multi-label needs a classifier head, and {name} answers by a prompt, which gives one label: train it "
            "with train/classify.py --multi-label and evaluate its final/"
        )
