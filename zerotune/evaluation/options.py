"""How a model is evaluated on labelled text, and the checks before a weight is loaded."""

from dataclasses import dataclass

from zerotune.errors import Refused
from zerotune.models.attention import attention_kernel, check_kernel_precision
from zerotune.models.model_files import generator_record
from zerotune.models.pretrained import answers_by_prompt, check_window
from zerotune.settings.groups import ModelSettings, PromptSettings, TextSettings
from zerotune.tasks.prompts import uses_chat


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """How a model is evaluated, on any task.

    Attributes:
        tokens_per_device: most padded tokens in one forward pass on one device.
        seed: of the shots, of an untrained head, and of bootstrap intervals.
        shots: solved examples or questions in the prompt.
        wording: number of the prompt among the task's wordings.
        data_sha256: of the items' source, which their ids do not identify.
    """

    model: ModelSettings
    prompt: PromptSettings
    tokens_per_device: int
    seed: int = 0
    shots: tuple = ()
    wording: int = 0
    data_sha256: str | None = None

    def described(self) -> dict:
        """Return the settings as entries of metrics.json."""
        return {
            "model": self.model.name,
            "revision": self.model.revision,
            "attention": self.model.attention,
            "tokens_per_device": self.tokens_per_device,
            "load_4bit": self.model.method == "qlora",
            "prompt_format": self.prompt.format,
            "shots": len(self.shots),
            "seed": self.seed,
            "data_sha256": self.data_sha256,
            "dtype": self.model.precision,
        }


@dataclass(frozen=True, kw_only=True)
class TextEvaluation(ModelEvaluation):
    """How a model is evaluated on labelled text.

    Attributes:
        as_generator: cut prompts as for a generator, so that a model gets the same ones before and after tuning.
    """

    text: TextSettings
    as_generator: bool = False

    def described(self) -> dict:
        """Return the settings as entries of metrics.json."""
        return super().described() | {
            "max_length": self.text.max_length,
            "truncation": self.text.truncation,
            "calibrate": self.prompt.calibrate,
            "answer_by": self.prompt.answer_by,
            "as_generator": self.as_generator,
            "wording": self.wording,
        }


def base_model(model: ModelSettings) -> ModelSettings:
    """Return the settings that load a run's model for evaluation before training: without adapters."""
    return ModelSettings(
        name=model.name,
        revision=model.revision,
        method="qlora" if model.method == "qlora" else "full",
        attention=model.attention,
        precision=model.precision,
        seed=model.seed,
    )


def tuned_model(final: str, model: ModelSettings) -> ModelSettings:
    """Return the settings that load a run's final/."""
    return ModelSettings(final, attention=model.attention, precision=model.precision)


def training_description(record: dict, model: str, seed: int) -> dict:
    """Return the part of metrics.json about a model's training.

    Args:
        record: content of task.json, {} for a model that zerotune did not tune.
        model, seed: the evaluation's, used if the record has none.
    """
    return {
        "method": record.get("method"),
        "model": record.get("base_model", model),
        "seed": record.get("seed", seed),
        "training_sha256": record.get("training_sha256"),
    }


def check_flags(evaluation: TextEvaluation, config, tokenizer) -> None:
    """Refuse flags that this model would ignore or cannot follow."""
    model, prompt = evaluation.model, evaluation.prompt
    attention_kernel(model.attention, config)
    check_kernel_precision(model.attention, model.precision)
    if prompt.answer_by == "generation" and prompt.calibrate != "none":
        raise Refused("--calibrate is about likelihoods, which --answer-by generation does not compare: drop one")
    record = generator_record(model)
    if record is not None:
        check_own_prompt(evaluation, record)
        return
    if answers_by_prompt(config):
        uses_chat(prompt.format, tokenizer, model.name)
        return
    if evaluation.text.max_length is not None:
        check_window(model.name, config, evaluation.text.max_length)
    given = {
        "--shots": evaluation.shots,
        "--calibrate": prompt.calibrate != "none",
        "--answer-by": prompt.answer_by != "likelihood",
        "--prompt-format": prompt.format != "auto",
    }
    ignored = [flag for flag, is_given in given.items() if is_given]
    if ignored:
        raise Refused(
            f"{model.name} answers with a classifier head, which has no use for {', '.join(ignored)}: leave it out"
        )


def check_own_prompt(evaluation: ModelEvaluation, record: dict) -> None:
    """Refuse flags of a prompt for a model that was tuned to write its answers; `record` is its task.json."""
    own_format = record["prompt"]["format"]
    given = {
        "--shots": evaluation.shots or evaluation.prompt.shots,
        "--prompt-seeds": evaluation.wording,
        "--prompt-format": evaluation.prompt.format not in ("auto", own_format),
    }
    others = [flag for flag, is_given in given.items() if is_given]
    if others:
        raise Refused(
            f"{evaluation.model.name} was tuned on a prompt of its own, without shots and in the {own_format} format: "
            f"leave {', '.join(others)} out"
        )
