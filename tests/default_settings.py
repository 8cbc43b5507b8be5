"""Settings with the flags' defaults, for tests that change a few."""

from pathlib import Path

from zerotune.evaluation.options import TextEvaluation
from zerotune.settings.groups import (
    FlagRecord,
    ModelSettings,
    OptimisationSettings,
    PromptSettings,
    RunSettings,
    TextSettings,
)

DEFAULTS = {
    "epochs": 3, "max_steps": None, "batch_size": 32, "tokens_per_device": 2048, "optimizer": "adamw",
    "learning_rate": 2e-5, "head_learning_rate": 1e-4, "warmup_ratio": 0.06, "weight_decay": 0.01,
    "max_grad_norm": 1.0, "patience": None, "choose_by": "accuracy", "eval_every": None, "seed": 0,
}  # fmt: skip


def optimisation_settings(**changes) -> OptimisationSettings:
    """Return the defaults of the optimisation flags with some changes."""
    return OptimisationSettings(**DEFAULTS | changes)


def run_settings(folder: Path, flags: dict | None = None, typed: tuple[str, ...] = (), **changes) -> RunSettings:
    """Return the defaults of the run flags with some changes, for a run in a folder."""
    return RunSettings(Path(folder), FlagRecord(flags or {}, frozenset(typed)), **changes)


def text_evaluation(
    name: str, model: dict | None = None, text: dict | None = None, prompt: dict | None = None, **changes
) -> TextEvaluation:
    """Return the defaults of an eval script's flags with some changes, for a model in float32."""
    groups = {"text": TextSettings(**text or {}), "prompt": PromptSettings(**prompt or {})}
    return TextEvaluation(model=ModelSettings(name, **model or {}), **groups, **{"tokens_per_device": 64} | changes)
