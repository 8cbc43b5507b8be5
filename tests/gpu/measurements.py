"""All measurements, the most important first: what a run that is cut short has done is what matters most."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import Bench, Skipped
from inference import score_few_shot, train_writing, write
from machine import device_rates, profile_steps, save_and_load
from packed import train_packed
from random_models import SHAPES, TASK_LENGTHS
from training import train, train_with_trainer

ZERO2 = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
BY_NAME = {f"{shape.name}/{shape.method}": shape for shape in SHAPES}
LLAMA, LLAMA_LORA = BY_NAME["Llama-3.2-1B/full"], BY_NAME["Llama-3.2-1B/lora"]
MISTRAL, MISTRAL_QLORA = BY_NAME["Mistral-7B/lora"], BY_NAME["Mistral-7B/qlora"]
ROBERTA, GEMMA = BY_NAME["RoBERTa-large/full"], BY_NAME["Gemma-2-2B/lora"]
K = 1024
USUAL_TOKENS = 16 * K


@dataclass(frozen=True)
class Measurement:
    """One row to be measured.

    Attributes:
        name: "kind/model/method/task/tokens …", which tells it apart from the others.
        run: what measures it, (Bench) -> figures.
        limit_s: when its process is ended; the rest resumes in another one.
        own_process: run by itself in a process (it leaves a process group behind).
    """

    name: str
    run: Callable[[Bench], dict]
    limit_s: float = 40
    own_process: bool = False


def _train(shape, task: str, tokens: int = USUAL_TOKENS, label: str = "", **told) -> Measurement:
    name = f"train/{shape.name}/{shape.method}/{task}/{tokens // K}k"
    return Measurement(name + (f"/{label}" if label else ""), partial(_needs, train, shape, task, tokens, **told))


def _trainer(shape, task: str, tokens: int = USUAL_TOKENS) -> Measurement:
    name = f"trainer/{shape.name}/{shape.method}/{task}/{tokens // K}k"
    return Measurement(name, partial(_needs, train_with_trainer, shape, task, tokens), limit_s=60)


def _packed(shape, task: str, compiled: bool = False) -> Measurement:
    name = f"packed/{shape.name}/{shape.method}/{task}/16k" + ("/compiled" if compiled else "")
    run = partial(_needs, train_packed, shape, task, USUAL_TOKENS, compiled=compiled)
    return Measurement(name, run, limit_s=120 if compiled else 40)


def _profile(shape, task: str) -> Measurement:
    name = f"profile/{shape.name}/{shape.method}/{task}/16k"
    return Measurement(name, partial(_needs, profile_steps, shape, task, USUAL_TOKENS), limit_s=60)


def _needs(run, shape, *args, bench: Bench, **told) -> dict:
    if shape.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    if told.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    return run(bench, shape, *args, **told)


def before_tests() -> list[Measurement]:
    """What comes before the GPU tests."""
    return [
        Measurement("device", lambda bench: device_rates(bench)),
        _train(LLAMA, "imdb"),
        _trainer(LLAMA, "imdb"),
        _train(LLAMA, "sst2"),
        _trainer(LLAMA, "sst2"),
        _packed(LLAMA, "imdb"),
        _packed(LLAMA, "sst2"),
        _profile(LLAMA, "imdb"),
        _train(LLAMA_LORA, "sst2"),
        _train(LLAMA_LORA, "imdb"),
        _profile(LLAMA_LORA, "sst2"),
        _trainer(LLAMA_LORA, "sst2"),
        _trainer(LLAMA_LORA, "imdb"),
        _packed(LLAMA, "imdb", compiled=True),
        _train(MISTRAL, "imdb", 8 * K),
        _train(MISTRAL_QLORA, "imdb"),
        _train(ROBERTA, "imdb"),
        _train(GEMMA, "imdb"),
        Measurement("save/Llama-3.2-1B/full/4-layers", lambda bench: save_and_load(bench, LLAMA, 4), limit_s=60),
        Measurement("few-shot/Llama-3.2-1B/sst2/16-shots", lambda bench: score_few_shot(bench, LLAMA, "sst2", 16, 16 * K)),
        Measurement("write/Llama-3.2-1B/squad", lambda bench: write(bench, LLAMA, 16 * K)),
    ]


def after_tests() -> list[Measurement]:
    """What comes after the GPU tests: variants, then the rest of the grid."""
    variants = [
        _train(LLAMA, "imdb", label="recomputing", checkpointing=True),
        _train(MISTRAL, "imdb", 8 * K, label="recomputing", checkpointing=True),
        _train(LLAMA, "imdb", label="eager", attention="eager"),
        _train(LLAMA, "imdb", label="flash", attention="flash_attention_2"),
        _train(LLAMA, "sst2", label="batch-32", batch_size=32),
        _train(LLAMA_LORA, "sst2", label="batch-32", batch_size=32),
        _train(LLAMA, "sst2", label="batch-256", batch_size=256),
        _train(LLAMA_LORA, "imdb", label="no-input-cast", peft_casts=False),
        _packed(LLAMA_LORA, "sst2"),
        _packed(LLAMA_LORA, "imdb"),
        _packed(MISTRAL, "imdb"),
        Measurement("write-train/Llama-3.2-1B/full/squad/16k", lambda bench: train_writing(bench, LLAMA, 16 * K)),
        Measurement("few-shot/Llama-3.2-1B/imdb/4-shots", lambda bench: score_few_shot(bench, LLAMA, "imdb", 4, 16 * K)),
        Measurement(
            "train/Llama-3.2-1B/full/imdb/16k/zero2",
            partial(_needs, train, LLAMA, "imdb", USUAL_TOKENS, deepspeed=ZERO2),
            limit_s=90,
            own_process=True,
        ),
    ]
    compiled = [_packed(LLAMA_LORA, "sst2", compiled=True)]
    compiled += [_train(LLAMA, "imdb", label="compiled", compiled=True)]
    trainers = [_trainer(MISTRAL, "imdb", 8 * K), _trainer(ROBERTA, "imdb"), _trainer(GEMMA, "imdb")]
    shapes = (LLAMA, LLAMA_LORA, MISTRAL, MISTRAL_QLORA, ROBERTA, GEMMA)
    # neighbours share an engine
    grid = [
        _train(shape, task, tokens) for shape in shapes for task in TASK_LENGTHS for tokens in (16 * K, 32 * K, 8 * K)
    ]
    earlier = {measurement.name for measurement in [*before_tests(), *variants]}
    usual = [measurement for measurement in grid if "/16k" in measurement.name and measurement.name not in earlier]
    rest = [measurement for measurement in grid if "/16k" not in measurement.name and measurement.name not in earlier]
    return [*variants, *usual, *trainers, *compiled, *rest]
