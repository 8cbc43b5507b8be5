"""What a training run would find impossible, refused before a weight is loaded or a file written."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from zerotune.errors import Refused
from zerotune.evaluation.options import answers_by_prompt
from zerotune.models.attention import attention_kernel
from zerotune.models.heads import is_encoder
from zerotune.models.pretrained import check_window, is_trained_classifier
from zerotune.tasks.prompts import uses_chat
from zerotune.training import checkpoints


def check_run_flags(args) -> None:
    """Refuse a checkpoint, a tracker or an upload that the end of the run would find impossible."""
    if args.resume not in ("auto", "never"):
        folder, root = Path(args.resume), args.output_dir / "checkpoints"
        if not os.path.isfile(folder / checkpoints.MARKER):
            raise Refused(f"--resume {folder}: no {checkpoints.MARKER} marker: name a whole checkpoint, or use auto")
        if folder.resolve().parent != root.resolve():  # the best checkpoint and the logs lie beside it
            raise Refused(
                f"--resume {folder} is no checkpoint of this run: name one of {root}, or copy that run's whole folder"
            )
    if args.tracker == "wandb" and find_spec("wandb") is None:
        raise Refused("--tracker wandb needs wandb, which is not installed: pip install 'zerotune[wandb]'")
    if args.push_to_hub:
        check_upload(args.push_to_hub)


def check_upload(name: str) -> None:
    """Raises Refused for an --push-to-hub that cannot work: offline, without a token, or no name for a repository."""
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


def check_head(args, config, tokenizer) -> None:
    """Refuse a head that the model cannot have, and flags that are about another one."""
    if args.head == "generate":
        check_generator(args, config, "classify")
        if args.truncation != "head":
            raise Refused(f"--truncation {args.truncation} is a classifier's: a prompt's text is cut in the middle")
    elif args.prompt_format != "auto" and not answers_by_prompt(config):
        raise Refused(f"--prompt-format {args.prompt_format}: {args.model} is never asked by a prompt: leave it out")
    uses_chat(args.prompt_format, tokenizer, args.model)


def check_generator(args, config, other_head: str) -> None:
    """Refuse a model that cannot write, and a rate for a head that --head generate does not have."""
    if is_encoder(config) or is_trained_classifier(config):
        kind = "an encoder" if is_encoder(config) else "published as a classifier, without an LM head"
        raise Refused(f"--head generate needs a causal model, and {args.model} is {kind}: use --head {other_head}")
    if args.head_learning_rate is not None:
        raise Refused(f"--head-learning-rate is of --head {other_head}: --head generate has no new head, leave it out")


def check_model_flags(args, config) -> None:
    """Refuse texts that are longer than the model's positions, and an attention kernel that it cannot use."""
    attention_kernel(args.attention, config)
    if args.attention == "flex_attention" and not torch.cuda.is_available():
        raise Refused("--attention flex_attention trains on a GPU only, and there is none; use --attention auto")
    if getattr(config, "quantization_config", None) is not None:
        raise Refused(
            f"{args.model} is quantised already and cannot be trained: give the model it was made from; "
            "--method qlora quantises it while it is loaded"
        )
    if args.max_length is not None:
        check_window(args.model, config, args.max_length)


def check_trainer_flags(args, precision: str, deepspeed: dict | None) -> None:
    """Refuse what --engine loop does and --engine trainer does not."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.head == "generate":
        raise Refused("--engine trainer tunes a classifier: use --head classify, or --engine loop")
    if deepspeed is not None:
        raise Refused("--engine trainer runs without DeepSpeed: leave it out, or use --engine loop")
    if args.scratch_dir:
        raise Refused("--engine trainer saves to the run folder at once: leave --scratch-dir out, or use --engine loop")
    if precision == "fp16" and not torch.cuda.is_available():
        raise Refused("--engine trainer computes in fp16 on a GPU only: use --precision fp32 or bf16, or --engine loop")
    if args.batch_size % num_processes:
        raise Refused(
            f"--engine trainer gives each process equally many examples of a step, and --batch-size {args.batch_size} "
            f"is no multiple of {num_processes} processes: choose one that is, or use --engine loop"
        )
