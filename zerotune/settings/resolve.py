"""Turn parsed flags into settings: defaults are filled in once, nothing is modified, nothing is loaded."""

from argparse import Namespace
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from zerotune.errors import BrokenMachine, Refused
from zerotune.files import is_there, read_json
from zerotune.settings.deepspeed import (
    check_deepspeed_config,
    fill_deepspeed_config,
    read_deepspeed_config,
    zero_stage,
)
from zerotune.settings.flags import LABEL_SET_METRICS
from zerotune.settings.groups import (
    DataSettings,
    EvalSettings,
    FlagRecord,
    Interval,
    ModelSettings,
    OptimisationSettings,
    PromptSettings,
    QuestionSettings,
    RunSettings,
    TextSettings,
    TrainSettings,
)
from zerotune.settings.names import (
    check_names_model,
    default_eval_folder,
    default_run_folder,
    final_of_run,
    model_or_default,
)
from zerotune.settings.precision import PRECISIONS, resolve_precision

EPOCHS, FULL_RATE, ADAPTER_RATE, HEAD_RATE_FACTOR = 3, 2e-5, 2e-4, 5
# Most padded tokens of a micro-batch in training, of a forward pass in evaluation, and of either on a CPU, which gains
# nothing from large batches.
TRAIN_TOKENS, EVAL_TOKENS, CPU_TOKENS = 8192, 16384, 2048
NOT_FLAGS = ("typed", "preset_line", "runs")  # entries that a parser adds to the flags
FILE_FLAGS = ("train_file", "validation_file", "test_file")
ADAPTER_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout")


def train_settings(args: Namespace, task: str, sample_defaults: dict[str, float]) -> TrainSettings:
    """Resolve the flags of a train script.

    Args:
        task: "sst2", "imdb", "classify" or "squad".
        sample_defaults: `epochs` and `learning_rate` of training the tiny model of --sample.
    Raises:
        Refused: the DeepSpeed file cannot be read or contradicts the flags, flags for a plan come without --plan,
            flags about adapters with --method full, or a run given as --model has no final/.
    """
    _check_adapter_flags(args.method, args.typed)
    head = args.head
    of_sample = sample_defaults if args.sample and args.model is None else {}
    model = final_of_run(model_or_default(args.model, args.sample, task))
    epochs = args.epochs or of_sample.get("epochs", EPOCHS)
    rate = args.learning_rate
    if rate is None:
        rate = of_sample.get("learning_rate", FULL_RATE if args.method == "full" else ADAPTER_RATE)
    head_rate = args.head_learning_rate
    if head_rate is None and head != "generate":
        head_rate = HEAD_RATE_FACTOR * rate
    deepspeed = read_deepspeed_config(args.deepspeed)
    if not args.plan and (args.devices or args.device_memory or args.node_bandwidth):
        raise Refused(
            "--devices, --device-memory and --node-bandwidth say what a plan is for: add --plan, or leave them out"
        )
    output_dir = args.output_dir or default_run_folder(task, model, args.method, head)
    for_gpu = args.plan and args.device_memory is not None
    if for_gpu and args.precision == "auto":
        precision = "bf16"
    else:
        precision = resolve_precision(args.precision, deepspeed, _precision_begun_with(output_dir))
    stage = zero_stage(deepspeed)
    tokens = TRAIN_TOKENS if for_gpu else tokens_per_device(args.tokens_per_device, TRAIN_TOKENS)
    tokens = args.tokens_per_device or tokens
    choose_by = args.choose_by
    if getattr(args, "multi_label", False) and "choose_by" not in args.typed:
        choose_by = LABEL_SET_METRICS[0]
    resolved = {
        "choose_by": choose_by,
        "epochs": epochs,
        "learning_rate": rate,
        "head_learning_rate": head_rate,
        "tokens_per_device": tokens,
    }
    optimisation = _group(OptimisationSettings, args, **resolved)
    if deepspeed is not None:
        if args.gradient_exchange != "fp32":
            raise Refused(
                f"--gradient-exchange {args.gradient_exchange} is for runs without DeepSpeed, which exchanges in the "
                "type of --precision: leave one of them out"
            )
        check_deepspeed_config(deepspeed, optimisation)
        deepspeed = fill_deepspeed_config(deepspeed, optimisation.max_grad_norm, precision)
    recorded = resolved | {"model": model, "output_dir": output_dir}
    return TrainSettings(
        task=task,
        head=head,
        engine=getattr(args, "engine", "loop"),
        model=_group(ModelSettings, args, name=model, precision=precision, zero_stage=stage),
        data=data_settings(args),
        optimisation=optimisation,
        run=_group(RunSettings, args, output_dir=output_dir, flags=record_flags(args, recorded)),
        prompt=_prompt_settings(args),
        text=_group(TextSettings, args),
        questions=_group(QuestionSettings, args),
        deepspeed=deepspeed,
    )


def _precision_begun_with(folder: Path) -> str | None:
    """Return the precision of a folder's run, None without one: a job may be requeued to another kind of device."""
    path = folder / "run.json"
    try:
        begun_with = read_json(path)["identity"]["precision"] if is_there(path) else None
    except BrokenMachine:
        raise
    except (Refused, KeyError, TypeError):
        return None  # a damaged record, which the run itself refuses
    return begun_with if begun_with in PRECISIONS else None


def _check_adapter_flags(method: str, typed: Collection[str]) -> None:
    """Refuse flags about adapters without a --method that adds adapters.

    Args:
        typed: names of the flags on the command line and in the preset. If `--method full` is among them, flags about
            adapters come from the preset, or are meant for other runs of a sweep.
    """
    unused = [f"--{name.replace('_', '-')}" for name in ADAPTER_FLAGS if name in typed]
    if unused and method == "full" and "method" not in typed:
        raise Refused(f"{unused[0]} is for --method lora or qlora, and --method is full: add --method, or leave it out")


def eval_settings(args: Namespace, task: str) -> EvalSettings:
    """Resolve the flags of an eval script.

    Raises:
        Refused: there is no model, a run without final/, or a --train-file that looks as if it named the items.
    """
    check_names_model(args.model, args.sample)
    names_items = args.test_file or args.validation_file or args.dataset or args.split
    if args.train_file and not names_items and "shots" not in args.typed:
        raise Refused(
            f"--train-file {args.train_file} gives the shots of a prompt, and --shots is 0: name the items to "
            "score with --test-file, or add --shots"
        )
    model = final_of_run(model_or_default(args.model, args.sample, task))
    output_dir = args.output_dir or default_eval_folder(task, model)
    resolved = {"model": model, "output_dir": output_dir}
    return EvalSettings(
        task=task,
        model=_group(
            ModelSettings,
            args,
            name=model,
            method="qlora" if args.load_4bit else "full",
            precision=resolve_precision(args.precision, None),
        ),
        data=data_settings(args),
        run=RunSettings(output_dir=output_dir, flags=record_flags(args, resolved), plan=args.plan),
        prompt=_prompt_settings(args),
        text=_group(TextSettings, args),
        questions=_group(QuestionSettings, args),
        tokens_per_device=tokens_per_device(args.tokens_per_device, EVAL_TOKENS),
        seed=args.seed,
        labels=getattr(args, "labels", None) and tuple(args.labels),
    )


def data_settings(args: Namespace) -> DataSettings:
    """Resolve the data flags of any script; flags that it does not have get their defaults."""
    given = {each.name: getattr(args, each.name, each.default) for each in fields(DataSettings)}
    files = {name: given[name] and str(Path(given[name]).absolute()) for name in FILE_FLAGS}
    return DataSettings(**given | files)


def tokens_per_device(wanted: int | None, on_gpu: int) -> int:
    """Return --tokens-per-device, else `on_gpu` where there is a GPU, else CPU_TOKENS."""
    import torch

    return wanted or (on_gpu if torch.cuda.is_available() else CPU_TOKENS)


def record_flags(args: Namespace, resolved: dict[str, object]) -> FlagRecord:
    """Return the flags as plain JSON values, with those of `resolved` in place of the given ones."""
    values = {name: value for name, value in vars(args).items() if name not in NOT_FLAGS} | resolved
    plain = {
        name: str(value) if isinstance(value, (Path, Interval)) else value for name, value in sorted(values.items())
    }
    return FlagRecord(plain, getattr(args, "typed", frozenset()))


def _prompt_settings(args: Namespace) -> PromptSettings:
    names = {"shots": "shots", "prompt_seeds": "seeds", "prompt_format": "format"}
    names |= {"calibrate": "calibrate", "answer_by": "answer_by"}
    return PromptSettings(**{name: getattr(args, flag) for flag, name in names.items() if hasattr(args, flag)})


def _group(kind: type, args: Namespace, **resolved):
    """Return a group of settings, each from `resolved`, else from the flag of the same name, else the default."""
    given = {each.name: getattr(args, each.name) for each in fields(kind) if hasattr(args, each.name)}
    return kind(**given | resolved)
