"""Plan an evaluation without loading a weight: the model's size and architecture, its batches and their memory."""

from collections.abc import Callable

from zerotune.errors import Unavailable
from zerotune.evaluation.by_head import head_lengths
from zerotune.evaluation.by_prompt import plan_prompt, prompt_batches
from zerotune.evaluation.options import TextEvaluation
from zerotune.models.parameters import published_table
from zerotune.models.pretrained import answers_by_prompt
from zerotune.models.shapes import config_to_plan, has_tokenizer
from zerotune.run.plan import describe_bytes, describe_memory, weight_bytes
from zerotune.settings.groups import EvalSettings
from zerotune.tasks.splits import Example
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import classifier_data
from zerotune.training.plan import describe_architecture


def plan_evaluation(settings: EvalSettings, describe: Callable[[], list[str]]) -> str:
    """Describe an evaluation; its batches only if data and tokenizer are on this machine.

    Args:
        describe: () -> lines about its items, prompts, batches and memory.
    Raises:
        Refused: the model or the data cannot be used.
    """
    model = settings.model
    config, shape = config_to_plan(model.name, model.revision)
    table = published_table(config)
    groups = ", ".join(f"{name} {count:,}" for name, count in table["groups"].items() if count)
    lines = [
        f"{model.name}: {model.precision}"
        + (f" (the published shape of {shape}; no file of the model was read)" if shape else ""),
        f"parameters: {table['total']:,} ({groups})",
        describe_architecture(config),
    ]
    if shape or not has_tokenizer(model.name, model.revision):
        weights = f"weights: {describe_bytes(weight_bytes(table, model))} in {model.precision}"
        weights += ", linear layers in 4 bits" if model.method == "qlora" else ""
        return "\n".join([*lines, weights, "batches: unknown without a tokenizer"])
    try:
        return "\n".join([*lines, *describe()])
    except Unavailable as refusal:
        return "\n".join([*lines, f"data: not on this machine, so the batches are unknown ({refusal})"])


def describe_batches(
    evaluations: dict[object, TextEvaluation], task, examples: list[Example], config, tokenizer
) -> list[str]:
    """Return lines about the items, the prompt, the batches and the memory of the first evaluation."""
    evaluation = next(iter(evaluations.values()))
    lines = [f"items: {len(examples):,}" + (f", asked with {len(evaluations)} prompts" if len(evaluations) > 1 else "")]
    if not answers_by_prompt(config):
        max_length, truncation = head_lengths(evaluation, task, config)
        data = classifier_data(task, tokenizer, config, examples, max_length, truncation)
        batches = evaluation_batches(data.lengths, evaluation.tokens_per_device)
        return [*lines, f"batches: {len(batches):,} of at most {evaluation.tokens_per_device:,} padded tokens, by head"]
    plan = plan_prompt(evaluation, task, config, tokenizer)
    data = plan.checked(plan.encode(texts=[example.text for example in examples]), config)
    _, batches, memory = prompt_batches(evaluation, plan, data, config)
    return [
        *lines,
        f"prompt: {plan.description['setting']}, {data.num_shared:,} tokens shared by all, {data.num_truncated:,} cut",
        f"batches: {len(batches):,} of at most {evaluation.tokens_per_device:,} padded tokens",
        describe_memory(memory),
    ]
