"""All measurements, the most important first in case a run is cut short."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import Bench, Setup, Skipped
from inference import score_few_shot, train_writing, write
from machine import device_rates, profile_steps, save_and_load
from packed import train_packed
from random_models import SHAPES
from training import train, train_with_trainer

ZERO2 = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
BY_NAME = {f"{shape.name}/{shape.method}": shape for shape in SHAPES}
LLAMA, LLAMA_LORA = BY_NAME["Llama-3.2-1B/full"], BY_NAME["Llama-3.2-1B/lora"]
MISTRAL, MISTRAL_QLORA = BY_NAME["Mistral-7B/lora"], BY_NAME["Mistral-7B/qlora"]
ROBERTA, GEMMA = BY_NAME["RoBERTa-large/full"], BY_NAME["Gemma-2-2B/lora"]
SHAPES_MEASURED = (LLAMA, LLAMA_LORA, MISTRAL, MISTRAL_QLORA, ROBERTA, GEMMA)
TASKS = ("imdb", "sst2", "squad")
K = 1024
USUAL = 16 * K  # tokens of a micro-batch


@dataclass(frozen=True)
class Measurement:
    """One row to be measured.

    Attributes:
        name: "kind/model/method/task/tokens/variant", with the parts that apply.
        run: takes the measurement: (Bench) -> figures. Raises Skipped.
        limit_s: after this time its process is killed; a new one continues with the rest.
        own_process: whether it needs its own process, because it leaves a process group behind.
    """

    name: str
    run: Callable[[Bench], dict]
    limit_s: float = 40
    own_process: bool = False


def before_tests() -> list[Measurement]:
    """Return the measurements that come before the GPU tests."""
    return [
        Measurement("device", device_rates),
        _train(LLAMA, "imdb"),
        _trainer(LLAMA, "imdb"),
        _train(LLAMA, "imdb", variant="not-fused", fuses=False),
        _train(LLAMA, "sst2"),
        _trainer(LLAMA, "sst2"),
        _train(LLAMA, "imdb", variant="varlen", attention="varlen"),
        _train(LLAMA, "sst2", variant="padded", attention="sdpa"),
        _packed(LLAMA, "imdb"),
        _packed(LLAMA, "sst2"),
        _profile(LLAMA, "imdb"),
        _train(LLAMA_LORA, "sst2"),
        _train(LLAMA_LORA, "imdb"),
        _train(LLAMA_LORA, "imdb", variant="not-fused", fuses=False),
        _profile(LLAMA_LORA, "sst2"),
        _trainer(LLAMA_LORA, "sst2"),
        _trainer(LLAMA_LORA, "imdb"),
        _packed(LLAMA, "imdb", compiled=True),
        _train(MISTRAL, "imdb", 8 * K),
        _train(MISTRAL_QLORA, "imdb"),
        _train(MISTRAL_QLORA, "imdb", variant="not-fused", fuses=False),
        _train(ROBERTA, "imdb"),
        _train(GEMMA, "imdb"),
        _train(GEMMA, "imdb", variant="not-fused", fuses=False),
        Measurement("save/Llama-3.2-1B/full/4-layers", partial(save_and_load, shape=LLAMA, num_layers=4), limit_s=60),
        _few_shot("sst2", 16),
        Measurement("write/Llama-3.2-1B", partial(write, shape=LLAMA, tokens=USUAL)),
    ]


def after_tests() -> list[Measurement]:
    """Return the measurements that come after the GPU tests: variants, then the rest of shapes × tasks × tokens."""
    wanted = [
        _train(LLAMA, "imdb", variant="zero2", deepspeed=ZERO2),
        _train(LLAMA, "imdb", variant="recomputing", checkpointing=True),
        _train(MISTRAL, "imdb", 8 * K, variant="recomputing", checkpointing=True),
        _train(LLAMA, "imdb", variant="padded", attention="sdpa"),
        _train(LLAMA, "imdb", variant="eager", attention="eager"),
        _train(LLAMA, "imdb", variant="flash", attention="flash_attention_2"),
        _train(LLAMA, "sst2", variant="batch-256", batch_size=256),
        _train(LLAMA, "sst2", variant="batch-32", batch_size=32),
        _train(LLAMA_LORA, "sst2", variant="batch-32", batch_size=32),
        _train(LLAMA_LORA, "imdb", variant="no-input-cast", peft_casts=False),
        _packed(LLAMA_LORA, "sst2"),
        _packed(LLAMA_LORA, "imdb"),
        _packed(MISTRAL, "imdb"),
        Measurement("write-train/Llama-3.2-1B/full/squad/16k", partial(train_writing, shape=LLAMA, tokens=USUAL)),
        _few_shot("imdb", 4),
        *(_trainer(*one) for one in ((MISTRAL, "imdb", 8 * K), (ROBERTA, "imdb"), (GEMMA, "imdb"))),
        *(_train(*one) for one in itertools.product(SHAPES_MEASURED, TASKS)),
        _packed(LLAMA_LORA, "sst2", compiled=True),
        *(_train(*one) for one in itertools.product(SHAPES_MEASURED, TASKS, (32 * K, 8 * K))),
        _train(LLAMA, "imdb", variant="compiled", compiled=True),
    ]
    earlier = {measurement.name for measurement in before_tests()}
    return [measurement for measurement in wanted if measurement.name not in earlier]


def _name(kind: str, setup: Setup, tokens: int, variant: str = "") -> str:
    parts = [kind, setup.shape.name, setup.shape.method, setup.task, f"{tokens // K}k", variant]
    return "/".join(part for part in parts if part)


def _train(
    shape, task: str, tokens: int = USUAL, variant: str = "", batch_size=None, peft_casts: bool = True, **changed
) -> Measurement:
    setup = Setup(shape, task, **{"checkpointing": None} | changed)
    run = partial(_where_possible, train, setup, tokens=tokens, batch_size=batch_size, peft_casts=peft_casts)
    limit_s = 120 if setup.compiled else 90  # fused passes are also compiled when they first run
    return Measurement(_name("train", setup, tokens, variant), run, limit_s, own_process=bool(setup.deepspeed))


def _trainer(shape, task: str, tokens: int = USUAL) -> Measurement:
    setup = Setup(shape, task, checkpointing=None)
    run = partial(_where_possible, train_with_trainer, setup, tokens=tokens)
    return Measurement(_name("trainer", setup, tokens), run, limit_s=60)


def _packed(shape, task: str, compiled: bool = False) -> Measurement:
    setup = Setup(shape, task, compiled=compiled)
    run = partial(_where_possible, train_packed, setup, tokens=USUAL)
    variant = "compiled" if compiled else ""
    return Measurement(_name("packed", setup, USUAL, variant), run, limit_s=120 if compiled else 90)


def _profile(shape, task: str) -> Measurement:
    setup = Setup(shape, task)
    run = partial(_where_possible, profile_steps, setup, tokens=USUAL)
    return Measurement(_name("profile", setup, USUAL), run, limit_s=60)


def _few_shot(task: str, num_shots: int) -> Measurement:
    run = partial(score_few_shot, shape=LLAMA, task=task, num_shots=num_shots, tokens=USUAL)
    return Measurement(f"few-shot/Llama-3.2-1B/{task}/{num_shots}-shots", run)


def _where_possible(run, setup: Setup, bench: Bench, **sizes) -> dict:
    needed = {
        "bitsandbytes": setup.shape.method == "qlora",
        "deepspeed": setup.deepspeed is not None,
        "flash_attn": setup.attention == "flash_attention_2",
    }
    for package, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
    return run(bench, setup, **sizes)
