"""Typed settings by subject, to which a script's flags are resolved once. Frozen, and free of argparse and torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Flags that may differ when a run resumes: they do not change its numbers, up to rounding.
FREE_FLAGS = {
    "output_dir", "resume", "checkpoint_every", "keep_checkpoints", "log_every", "base_eval", "plan", "tracker",
    "push_to_hub", "state_file", "tokens_per_device", "scratch_dir", "devices", "device_memory", "node_bandwidth",
    "preset", "seeds", "sweep", "launcher",
}  # fmt: skip


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it is loaded and computes.

    Attributes:
        name: hub id or folder.
        revision: branch, tag or commit of a hub model.
        method: "full", "lora" or "qlora". An evaluation uses "qlora" for a base in NF4.
        precision: "bf16", "fp16" or "fp32", already resolved from flag, DeepSpeed file, launcher and device.
        compile: "auto": training runs compiled passes where `zerotune.models.fused` can; "none".
        zero_stage: DeepSpeed's ZeRO stage; None without DeepSpeed.
        seed: of a new head and of new adapters.
        drop_unpooled: run an encoder's last layer, after its attention, on the pooled token only; logits stay the same.
        device: the device onto which weights are read; None: into host memory.
        narrow_layers: read linear layers in the precision and the rest in float32, to evaluate a whole model.
        divides_layers: keep a part of every layer on each rank, to evaluate a model that does not fit on one device.
    """

    name: str
    revision: str | None = None
    method: str = "full"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    attention: str = "auto"
    precision: str = "fp32"
    activation_checkpointing: bool = False
    compile: str = "auto"
    zero_stage: int | None = None
    seed: int = 0
    drop_unpooled: bool = True
    device: str | None = None
    narrow_layers: bool = False
    divides_layers: bool = False


@dataclass(frozen=True)
class DataSettings:
    """Where rows come from and how they are split: with the sources' hashes, all that is needed to rebuild a split.

    File paths are absolute. Sizes are in rows (questions for SQuAD).

    Attributes:
        text_column, label_column: for the user's own labels; "A,B" for a pair of texts; None: the task's.
        glue: the name of one of GLUE's tasks.
        multi_label: whether a text has none, one or several labels.
        label_separator: between the labels of a text that may have several; None: a comma.
    """

    sample: bool = False
    dataset: str | None = None
    dataset_revision: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    split: str | None = None
    split_seed: int = 0
    train_size: int | None = None
    validation_size: int | None = None
    test_size: int | None = None
    limit_train: int | None = None
    limit_eval: int | None = None
    text_column: str | None = None
    label_column: str | None = None
    glue: str | None = None
    multi_label: bool = False
    label_separator: str | None = None


@dataclass(frozen=True)
class TextSettings:
    """How a text is cut.

    Attributes:
        max_length: most tokens of a text; with a generator, of a text with its prompt and answer. None: what the model
            folder says, else the task's.
        truncation: the part of a longer text that is kept, "head" or "head-and-tail".
    """

    max_length: int | None = None
    truncation: str = "head"


@dataclass(frozen=True)
class QuestionSettings:
    """How questions are put to a model, in tokens; None: the model folder's value, else the default.

    Attributes:
        max_length: of a span head's window; of a prompt with its answer where answers are written.
        doc_stride, max_answer_length, n_best: of a span head's windows and spans.
        max_new_tokens: most tokens of a written answer.
    """

    max_length: int | None = None
    doc_stride: int | None = None
    max_answer_length: int | None = None
    n_best: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class PromptSettings:
    """How a causal model is asked.

    Attributes:
        shots: solved examples in the prompt.
        seeds: evaluate this many prompts that differ in shots, their order and wording; None: one prompt.
        format: "auto", "plain" or "chat".
        calibrate: "none" or "contextual".
        answer_by: "likelihood" or "generation".
    """

    shots: int = 0
    seeds: int | None = None
    format: str = "auto"
    calibrate: str = "none"
    answer_by: str = "likelihood"


@dataclass(frozen=True)
class OptimisationSettings:
    """How a model is trained.

    Attributes:
        batch_size: examples per optimizer step over all devices.
        tokens_per_device: most padded tokens in one micro-batch on one device.
        learning_rate: peak; head_learning_rate: peak of a new head, None where there is none.
        max_grad_norm: None: no clipping.
        gradient_exchange: type in which gradients are exchanged without DeepSpeed, "fp32" or "bf16".
        schedule: of the learning rate after the warmup: "linear", "cosine" or "constant".
        label_smoothing: share of a target's probability that is spread over all classes, from 0 to below 1.
        class_weights: of labels in the loss: "none", or "balanced" over the training split.
        patience: stop after this many evaluations without gain; None: never.
        choose_by: metric of the validation split that picks the best checkpoint.
        eval_every: optimizer steps between evaluations; None: as zerotune/training/schedule.py chooses.
        seed: of the head, the order of examples and dropout.
    """

    epochs: int
    max_steps: int | None
    batch_size: int
    tokens_per_device: int
    optimizer: str
    learning_rate: float
    head_learning_rate: float | None
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float | None
    patience: int | None
    choose_by: str
    eval_every: int | None
    seed: int
    schedule: str = "linear"
    label_smoothing: float = 0.0
    class_weights: str = "none"
    gradient_exchange: str = "fp32"


@dataclass(frozen=True)
class FlagRecord:
    """The part of run.json about the command line.

    Attributes:
        values: every flag as a plain JSON value, defaults filled in.
        typed: the flags that the user gave.
    """

    values: Mapping[str, object]
    typed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Interval:
    """The interval between two checkpoints, in optimizer steps or in minutes; the other is None."""

    steps: int | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        return str(self.steps) if self.minutes is None else f"{self.minutes:g}m"


@dataclass(frozen=True)
class RunSettings:
    """Where a run writes, and how it saves, resumes and logs. `log_every` is in optimizer steps.

    Attributes:
        devices, device_memory: the number and bytes of memory of a plan's devices; None: those of this machine.
        node_bandwidth: for a plan, in Gbit/s; None: the plan does not cover several nodes.
    """

    output_dir: Path
    flags: FlagRecord
    resume: str = "auto"
    checkpoint_every: Interval = Interval(minutes=10)
    scratch_dir: Path | None = None
    keep_checkpoints: int = 2
    log_every: int = 10
    base_eval: str = "subset"
    plan: bool = False
    devices: int | None = None
    device_memory: int | None = None
    node_bandwidth: float | None = None
    tracker: str = "none"
    push_to_hub: str | None = None


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a train script.

    Attributes:
        task: "sst2", "imdb", "classify" or "squad".
        head: "classify", "generate" or "span".
        engine: "loop" or "trainer".
        text: for labelled text; questions: for SQuAD.
        deepspeed: the DeepSpeed configuration with every "auto" filled in; None without DeepSpeed.
    """

    task: str
    head: str
    model: ModelSettings
    data: DataSettings
    optimisation: OptimisationSettings
    run: RunSettings
    prompt: PromptSettings = field(default_factory=PromptSettings)
    text: TextSettings = field(default_factory=TextSettings)
    questions: QuestionSettings = field(default_factory=QuestionSettings)
    engine: str = "loop"
    deepspeed: dict | None = None


@dataclass(frozen=True)
class EvalSettings:
    """The settings of an eval script.

    Attributes:
        tokens_per_device: most padded tokens in one forward pass on one device.
        seed: of shots, of an untrained head, and of bootstraps.
        labels: the user's own labels to choose from; None: the model's, else the rows'.
    """

    task: str
    model: ModelSettings
    data: DataSettings
    run: RunSettings
    prompt: PromptSettings = field(default_factory=PromptSettings)
    text: TextSettings = field(default_factory=TextSettings)
    questions: QuestionSettings = field(default_factory=QuestionSettings)
    tokens_per_device: int = 2048
    seed: int = 0
    labels: tuple[str, ...] | None = None
