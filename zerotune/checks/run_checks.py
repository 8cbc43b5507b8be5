"""What a training run would find impossible, refused before a weight is loaded or a file written."""

import torch

from zerotune.errors import Refused
from zerotune.models.attention import attention_kernel
from zerotune.models.heads import is_encoder
from zerotune.models.pretrained import check_window, is_trained_classifier
from zerotune.settings.groups import ModelSettings


def check_generator(name: str, config, head_learning_rate: float | None, other_head: str) -> None:
    """Refuse a model that cannot write, and a rate for a head that --head generate does not have."""
    if is_encoder(config) or is_trained_classifier(config):
        kind = "an encoder" if is_encoder(config) else "published as a classifier, without an LM head"
        raise Refused(f"--head generate needs a causal model, and {name} is {kind}: use --head {other_head}")
    if head_learning_rate is not None:
        raise Refused(f"--head-learning-rate is of --head {other_head}: --head generate has no new head, leave it out")


def check_model_flags(settings: ModelSettings, config, max_length: int | None) -> None:
    """Refuse texts that are longer than the model's positions, and an attention kernel that it cannot use."""
    attention_kernel(settings.attention, config)
    if settings.attention == "flex_attention" and not torch.cuda.is_available():
        raise Refused("--attention flex_attention trains on a GPU only, and there is none; use --attention auto")
    if getattr(config, "quantization_config", None) is not None:
        raise Refused(
            f"{settings.name} is quantised already and cannot be trained: give the model it was made from; "
            "--method qlora quantises it while it is loaded"
        )
    if max_length is not None:
        check_window(settings.name, config, max_length)
