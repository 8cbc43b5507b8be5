"""The flags that the scripts share. Nothing here imports torch, so that `--help` answers at once."""

from collections.abc import Iterable
from pathlib import Path

from zerotune.settings.argument_types import (
    fraction,
    fraction_below_1,
    gibibytes,
    non_empty,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    positive_or_none,
    steps_or_minutes,
)
from zerotune.settings.flag_parser import FlagParser
from zerotune.settings.names import DEFAULT_MODEL
from zerotune.settings.train_parser import TrainParser

# Metrics that can choose the best checkpoint, the first by default: for one label per text, and for any number of them.
LABEL_METRICS = ("accuracy", "f1_macro", "matthews", "loss")
TRAIN_DEFAULT = f"default: {DEFAULT_MODEL}; with --sample a tiny Llama"
EVAL_DEFAULT = "default with --sample: a tiny Llama"
LABEL_SET_METRICS = ("f1_micro", "f1_macro", "exact_match", "loss")


def train_parser(
    description: str, task, choose_by: tuple[str, ...] = LABEL_METRICS, glue: Iterable[str] = ()
) -> TrainParser:
    """Return the parser of a train script: the flags that every task has, with the defaults of a task module.

    Args:
        choose_by: metrics that can choose the best checkpoint, the first by default.
        glue: names of GLUE's tasks; if given, the flags for the user's own labels are added.
    """
    parser = TrainParser(task.name, description)
    add_model_flags(parser, TRAIN_DEFAULT, trains=True)
    group = add_training_method_flags(
        parser,
        ("classify", "generate"),
        "classify: a new head on an encoder's first token or a causal model's last; generate: a causal model writes "
        "the label word after a prompt",
    )
    add_prompt_format(group)
    add_data_flags(parser, task.splits)
    if glue:
        _add_label_flags(parser, glue, trains=True)
    group = add_training_data_flags(parser)
    group.add_argument(
        "--max-length",
        type=positive_int,
        default=task.max_length,
        help="most tokens of a text, with --head generate including prompt and answer; longer texts are cut (default "
        "%(default)s)",
    )
    group.add_argument(
        "--truncation",
        choices=("head", "head-and-tail"),
        default="head",
        help="the part of a longer text that a classifier head sees; head-and-tail: a quarter from its head, "
        "the rest from its end (default %(default)s)",
    )
    group = add_optimisation_flags(parser, choose_by)
    group.add_argument(
        "--class-weights",
        choices=("none", "balanced"),
        default="none",
        help="weight of an example in the loss by its label; balanced: rows / (labels × the label's rows), counted in "
        "the training split; with --multi-label, of a label that a text has: rows without / rows with it "
        "(default %(default)s)",
    )
    add_run_flags(parser)
    return parser


def with_engine_flag(parser: FlagParser) -> FlagParser:
    """Add --engine, for train scripts that can leave the steps to the Hugging Face Trainer. Returns the parser."""
    parser.add_argument_group("optimisation, engine").add_argument(
        "--engine",
        choices=("loop", "trainer"),
        default="loop",
        help="our loop, or the Hugging Face Trainer to compare it with (default %(default)s)",
    )
    return parser


def _add_label_flags(parser: FlagParser, glue: Iterable[str], trains: bool) -> None:
    """Add the flags for the user's own labels to the parser of a train or eval script."""
    group = parser.add_argument_group("data, labels of your own")
    group.add_argument(
        "--text-column",
        type=non_empty,
        metavar="A[,B]",
        help="column of the texts, or two of a pair (default: text, or a usual name for it)",
    )
    group.add_argument(
        "--label-column", type=non_empty, metavar="NAME", help="column of the labels (default: label, or a usual name)"
    )
    group.add_argument("--glue", choices=sorted(glue), help="columns, labels and data set of one of GLUE's tasks")
    default = f"; {LABEL_SET_METRICS[0]} is then the default of --choose-by" if trains else " (default: as the model)"
    group.add_argument("--multi-label", action="store_true", help=f"texts may have no label, one, or several{default}")
    group.add_argument(
        "--label-separator",
        type=non_empty,
        metavar="TEXT",
        help="separates the labels of one text, unless they are a list (default: a comma)",
    )
    if not trains:
        group.add_argument(
            "--labels",
            nargs="+",
            type=non_empty,
            metavar="LABEL",
            help="labels to choose from (default: the model's, else those of --train-file or of the items)",
        )


def eval_parser(description: str, task, glue: Iterable[str] = ()) -> FlagParser:
    """Return the parser of an eval script: the flags that every task has, with the defaults of a task module.

    Args:
        glue: as in `train_parser`.
    """
    parser = FlagParser(description)
    add_model_flags(parser, EVAL_DEFAULT)
    add_data_flags(parser, task.splits, trains=False)
    if glue:
        _add_label_flags(parser, glue, trains=False)
    group = add_evaluation_flags(parser, "seed of the shots, and of a head that is not trained")
    group.add_argument(
        "--max-length",
        type=positive_int,
        help=f"most tokens of a text; longer ones are cut (default: the model folder's, else {task.max_length})",
    )
    _add_prompt_flags(parser)
    return parser


def publish_parser(description: str) -> FlagParser:
    """Return the parser of eval/publish.py."""
    parser = FlagParser(description)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder with a final/, or that final/")
    parser.add_argument("repository", nargs="?", metavar="ORG/NAME", help="upload to this repository of the hub")
    parser.add_argument(
        "--base-model",
        type=non_empty,
        metavar="ORG/NAME",
        help="the base model's hub id, where the run was made from a folder",
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.add_argument(
        "--merge", type=Path, metavar="FOLDER", help="new folder for the base with the adapter merged in"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="type of the stored weights; a head is always float32 (default %(default)s: as the base has them)",
    )
    return parser


def add_evaluation_flags(parser: FlagParser, seed_help: str):
    """Add the flags of every eval script besides model and data. Returns the group for the evaluation's data."""
    group = parser.add_argument_group("model, evaluation")
    group.add_argument("--load-4bit", action="store_true", help="load the backbone in NF4 (bitsandbytes)")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--tokens-per-device",
        type=positive_int,
        help="most tokens, padding included, in one forward pass on one device (default: 16384, on a CPU 2048)",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help=f"{seed_help} (default %(default)s)")
    group.add_argument(
        "--plan",
        action="store_true",
        help="print the evaluation's items and batches, for prompts also the memory, and stop",
    )
    group.add_argument("--output-dir", type=Path, help="folder for the results (default: runs/eval-TASK-MODEL)")
    group.add_argument(
        "--state-file", type=Path, help="file for the state if the run is refused before its folder exists"
    )
    group = parser.add_argument_group("data, evaluation")
    group.add_argument("--test-size", type=positive_int, help="balanced subset of the items, in rows, by --split-seed")
    return group


def add_model_flags(parser: FlagParser, default: str | None, trains: bool = False) -> None:
    """Add the flags that choose the model and its computation.

    Args:
        default: the help's words about a missing --model; None: it must be given.
        trains: whether it is a train script.
    """
    shown = f" ({default})" if default else ""
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=non_empty, help=f"hub id, or folder of a model or a run{shown}")
    group.add_argument("--revision", type=non_empty, help="branch, tag or commit of a hub model (default: main)")
    group.add_argument(
        "--attention",
        choices=("auto", "sdpa", "eager", "flash_attention_2", "flex_attention", "varlen"),
        default="auto",
        help="attention kernel; varlen: rows without padding (default %(default)s: varlen on a GPU in 16 bits where it "
        "can; else eager for Gemma-2 and DeBERTa, our own on a CPU, sdpa)",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="arithmetic of the "
        + ("forward and backward pass; weights that are trained stay float32 " if trains else "forward pass ")
        + "(default %(default)s: bf16 where the device has it, else fp32)",
    )


def add_training_method_flags(parser: FlagParser, heads: tuple[str, ...], heads_help: str):
    """Add --head with a task's heads, the first by default, and the method's flags. Returns the group."""
    group = parser.add_argument_group("model, training")
    group.add_argument("--head", choices=heads, default=heads[0], help=f"{heads_help} (default %(default)s)")
    group.add_argument(
        "--method", choices=("full", "lora", "qlora"), default="full", help="what is trained (default %(default)s)"
    )
    group.add_argument("--lora-rank", type=positive_int, default=8, help="rank of the adapters (default %(default)s)")
    group.add_argument(
        "--lora-alpha",
        type=positive_int,
        default=16,
        help="adapters' output is multiplied by alpha / rank (default %(default)s)",
    )
    group.add_argument(
        "--lora-dropout", type=fraction, default=0.0, help="dropout before each adapter (default %(default)s)"
    )
    group.add_argument(
        "--activation-checkpointing", action="store_true", help="recompute activations: less memory, about 30 %% slower"
    )
    group.add_argument(
        "--compile",
        choices=("auto", "none"),
        default="auto",
        help="auto: in 16 bits, compile what a layer does between its matrix products; on a CPU only for models of at "
        "least 100 million weights (default %(default)s)",
    )
    return group


ROW_FILES = "csv, tsv (no quoting), jsonl, each also .gz, or parquet"


def add_data_flags(parser: FlagParser, splits: tuple[str, ...], files: str = ROW_FILES, trains: bool = True) -> None:
    """Add the flags that say where the rows come from and how they are split, for a train or an eval script."""
    helps = {
        "train": files,
        "validation": "its rows validate: they choose the best checkpoint; without --test-file they are the test rows",
        "test": "its rows are the test rows, which give the final score",
        "split": "how rows are split into training, validation and test "
        f"(default: official; {splits[-1]} for --train-file alone)",
        "limit": "at most this many validation and this many test rows, drawn by --split-seed",
    }
    if not trains:
        helps = {
            "train": f"where shots come from, or with a drawn --split all rows; {files}",
            "validation": "the items, as --test-file",
            "test": "the items to score (default: those of the model's run, else the data set's)",
            "split": "score the test rows of this split",
            "limit": "at most this many items, drawn by --split-seed",
        }
    group = parser.add_argument_group("data")
    group.add_argument("--sample", action="store_true", help="generated text and a tiny model: no network, no GPU")
    group.add_argument("--dataset", type=non_empty, help="hub id of the data set (default: the task's own)")
    for name in ("train", "validation", "test"):
        group.add_argument(f"--{name}-file", type=Path, help=helps[name])
    group.add_argument("--split", choices=splits, help=helps["split"])
    group.add_argument(
        "--split-seed", type=non_negative_int, default=0, help="seed of every split and subset (default %(default)s)"
    )
    group.add_argument("--limit-eval", type=positive_int, help=helps["limit"])


def add_training_data_flags(parser: FlagParser):
    """Add the flags that limit the number of rows. Returns the group."""
    group = parser.add_argument_group("data, training")
    for split in ("train", "validation", "test"):
        group.add_argument(f"--{split}-size", type=positive_int, help=f"balanced subset of the {split} split, in rows")
    group.add_argument(
        "--limit-train", type=positive_int, help="train on at most this many rows, drawn by --split-seed"
    )
    return group


def add_optimisation_flags(parser: FlagParser, choose_by: tuple[str, ...]):
    """Add the optimiser's flags, and the metrics that can choose the best checkpoint, the first by default.

    Returns the group.
    """
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--epochs",
        type=positive_int,
        help="passes over the training split (default: 3; more for the questions of --sample)",
    )
    group.add_argument(
        "--max-steps",
        type=positive_int,
        help="at most this many optimizer steps; the learning rates' schedule ends there",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=32,
        help="examples per optimizer step over ALL devices (default %(default)s)",
    )
    group.add_argument(
        "--tokens-per-device",
        type=positive_int,
        help="most tokens, padding included, in one micro-batch on one device (default: 8192, on a CPU 2048)",
    )
    group.add_argument(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        default="adamw",
        help="adamw8bit keeps its state in 8 bits (bitsandbytes; default %(default)s)",
    )
    group.add_argument(
        "--learning-rate",
        type=non_negative_float,
        help="peak (default: 2e-5 full, 2e-4 LoRA and QLoRA; higher for --sample's own model)",
    )
    group.add_argument(
        "--head-learning-rate", type=non_negative_float, help="peak for a new head (default: 5 × --learning-rate)"
    )
    group.add_argument(
        "--schedule",
        choices=("linear", "cosine", "constant"),
        default="linear",
        help="learning rate after the warmup: falls to 0 along a line or half a cosine, or stays (default %(default)s)",
    )
    group.add_argument("--warmup-ratio", type=fraction, default=0.06, help="share of all steps (default %(default)s)")
    group.add_argument("--weight-decay", type=non_negative_float, default=0.01, help="AdamW's (default %(default)s)")
    group.add_argument(
        "--max-grad-norm",
        type=positive_or_none,
        default=1.0,
        help="clip to this norm; none: no clipping (default %(default)s)",
    )
    group.add_argument(
        "--gradient-exchange",
        choices=("fp32", "bf16"),
        default="fp32",
        help="type in which GPUs exchange gradients without DeepSpeed, which has its own way; bf16 sends half as much "
        "(default %(default)s)",
    )
    group.add_argument(
        "--label-smoothing",
        type=fraction_below_1,
        default=0.0,
        metavar="P",
        help="share of a target's probability, below 1, that is spread evenly over all classes: labels, positions of a "
        "window, or the vocabulary (default %(default)s)",
    )
    group.add_argument(
        "--patience",
        type=positive_int,
        help="stop after this many evaluations in a row without a new best one (default: never)",
    )
    group.add_argument(
        "--choose-by",
        choices=choose_by,
        default=choose_by[0],
        help="metric of the validation split that picks the best checkpoint (default %(default)s)",
    )
    group.add_argument(
        "--eval-every",
        type=positive_int,
        help="optimizer steps between evaluations (default: one to four per epoch, taking about a tenth of its time; "
        "one with --patience or for written answers of SQuAD)",
    )
    group.add_argument(
        "--seed",
        type=non_negative_int,
        default=0,
        help="seed of a new head or adapters, the order of examples, and dropout (default %(default)s)",
    )
    group.add_argument(
        "--seeds",
        type=non_negative_int,
        nargs="+",
        metavar="N",
        help="a run for each seed, and their mean ± sd",
    )
    group.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE",
        help="a run for each combination of the values in the file, whose lines are a flag and its values; the best on "
        "the validation split is chosen",
    )
    return group


def add_run_flags(parser: FlagParser) -> None:
    """Add the flags that say how a run is started, saved, resumed and logged."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--preset",
        type=non_empty,
        metavar="NAME|FILE",
        help="flags of a known experiment, of presets/NAME.txt or a file of your own; typed flags override them",
    )
    group.add_argument(
        "--launcher",
        type=non_empty,
        metavar="COMMAND",
        help="with --seeds or --sweep: starts each run, as 'accelerate launch --num_processes 8' (default: python)",
    )
    group.add_argument(
        "--deepspeed", type=Path, metavar="FILE", help="DeepSpeed configuration, such as ds_configs/zero2.json"
    )
    group.add_argument("--output-dir", type=Path, help="run folder (default: runs/TASK-MODEL-METHOD[-generate])")
    group.add_argument(
        "--resume",
        type=non_empty,
        default="auto",
        metavar="auto|never|PATH",
        help="which checkpoint to resume from (default %(default)s)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=steps_or_minutes,
        default="10m",
        metavar="STEPS|MINUTESm",
        help="optimizer steps between checkpoints, or minutes as in 10m (default %(default)s)",
    )
    group.add_argument(
        "--scratch-dir",
        type=Path,
        metavar="DIR",
        help="save to this node-local folder first, and move in the background",
    )
    group.add_argument(
        "--keep-checkpoints", type=positive_int, default=2, help="newest to keep, beside the best (default %(default)s)"
    )
    group.add_argument(
        "--log-every", type=positive_int, default=10, help="optimizer steps between log lines (default %(default)s)"
    )
    group.add_argument(
        "--base-eval",
        choices=("subset", "full", "none"),
        default="subset",
        help="evaluate before training on 1,000 test items, all of them, or not at all (default %(default)s)",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="print the plan of the run, its memory and its steps, and stop; reads no weights, and for common "
        "models needs only the name",
    )
    add_device_flags(group)
    group.add_argument(
        "--node-bandwidth",
        type=positive_float,
        metavar="GBIT",
        help="plan for 2, 4 and 8 nodes of --devices GPUs too, with this bandwidth per node in Gbit/s, and print the "
        "share of a step's time in which GPUs compute",
    )
    group.add_argument(
        "--tracker",
        choices=("none", "tensorboard", "wandb"),
        default="none",
        help="also send the lines of metrics.jsonl there (default %(default)s)",
    )
    group.add_argument(
        "--push-to-hub", type=non_empty, metavar="ORG/NAME", help="upload final/, report and eval/ at the run's end"
    )
    group.add_argument(
        "--state-file", type=Path, help="file for the state if the run is refused before its folder exists"
    )


def add_device_flags(group) -> None:
    """Add the flags that say which devices a plan is for."""
    group.add_argument("--devices", type=positive_int, help="number of GPUs of a --plan (default: as launched)")
    group.add_argument(
        "--device-memory",
        type=gibibytes,
        metavar="SIZE",
        help="plan for GPUs of this many GiB, as in 80G: what fits, and how to launch it (default: the device here)",
    )


def _add_prompt_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("prompt (causal models without a classifier head)")
    group.add_argument(
        "--shots", type=non_negative_int, default=0, help="labelled examples in the prompt (default %(default)s)"
    )
    group.add_argument(
        "--prompt-seeds",
        type=positive_int,
        metavar="N",
        help="evaluate N prompts that differ in shots, their order and the wording, and report their spread",
    )
    add_prompt_format(group)
    group.add_argument(
        "--answer-by",
        choices=("likelihood", "generation"),
        default="likelihood",
        help="which label word is likeliest, or which one the model writes first (default %(default)s)",
    )
    group.add_argument(
        "--calibrate",
        choices=("none", "contextual"),
        default="none",
        help="contextual: divide out the model's bias towards a label word (Zhao et al. 2021; default %(default)s)",
    )


def add_prompt_format(group) -> None:
    """Add --prompt-format."""
    group.add_argument(
        "--prompt-format",
        choices=("auto", "plain", "chat"),
        default="auto",
        help="default %(default)s: the chat template if a model is named -it, -chat or -instruct and has one",
    )
