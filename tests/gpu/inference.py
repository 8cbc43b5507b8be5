"""Time scoring and writing: zerotune's ways against plain ones, on a language model with random weights."""

import time
from array import array
from collections.abc import Callable

import numpy as np
import torch
from bench import Bench, Setup
from library_step import optimizer_step, prompt_data, question_data, score_prompts, write_answers
from random_models import Shape, random_ids, random_language_model, random_lengths, settings_for
from training import figures

from zerotune.training.batches import evaluation_batches

QUESTIONS_OF_A_CONTEXT, ANSWER_TOKENS = 5, 4
ANSWERS = [7, 8]  # two label words, one token each


def _language_model(bench: Bench, shape: Shape):
    """Make a language model in bf16 and eval mode, as an evaluation loads it."""
    bench.release()
    torch.manual_seed(0)
    config = shape.config(bench.toy)
    settings = settings_for(Shape(shape.name, "lora", shape.sizes), "bf16")
    return random_language_model(config, settings, bench.device, tuned=False).eval(), config.vocab_size


def _seconds(bench: Bench, run: Callable[[], object]) -> float:
    bench.wait()
    started = time.perf_counter()
    run()
    bench.wait()
    return time.perf_counter() - started


def score_few_shot(bench: Bench, shape: Shape, task: str, num_shots: int, tokens: int) -> dict:
    """Measure items per second of a few-shot evaluation. The plain loop computes every prompt whole, once for each
    answer, with the logits of all its tokens."""
    model, vocabulary = _language_model(bench, shape)
    generator = np.random.default_rng(0)
    num_items, num_plain = bench.count(1024, 8), bench.count(32, 4)
    head = random_ids(int(random_lengths(task, num_shots, generator).sum()), task, vocabulary, generator).tolist()
    lengths = random_lengths(task, num_items, generator)
    tails = [random_ids(int(length), task, vocabulary, generator).tolist() for length in lengths]
    data = prompt_data(head, tails, ANSWERS)
    batches = evaluation_batches(data.lengths, bench.tokens(tokens))
    score_prompts(model, data, batches[:2], bench.device)
    seconds = _seconds(bench, lambda: score_prompts(model, data, batches, bench.device))

    @torch.no_grad()
    def plain(items: range) -> None:
        rows = [torch.tensor([*head, *tails[item], answer]) for item in items for answer in ANSWERS]
        for start in range(0, len(rows), 16):
            some = rows[start : start + 16]
            ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True).to(bench.device)
            sizes = torch.tensor([len(row) for row in some], device=bench.device)
            mask = (torch.arange(ids.shape[1], device=bench.device) < sizes[:, None]).long()
            likelihoods = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
            likelihoods[torch.arange(len(some), device=bench.device), sizes - 2].cpu()

    plain(range(2))
    plain_seconds = _seconds(bench, lambda: plain(range(num_plain)))
    return {
        "shared_tokens": len(head),
        "items_per_s": num_items / seconds,
        "plain_items_per_s": num_plain / plain_seconds,
        "ratio": num_items / seconds / (num_plain / plain_seconds),
    }


def _questions(bench: Bench, vocabulary: int, num_contexts: int):
    """Make SQuAD-like data: contexts with five questions each."""
    generator = np.random.default_rng(0)
    ids = lambda length: array("i", random_ids(int(length), "squad", vocabulary, generator).tolist())  # noqa: E731
    contexts = [ids(length) for length in random_lengths("squad", num_contexts, generator)]
    num_questions = num_contexts * QUESTIONS_OF_A_CONTEXT
    questions = [ids(length) for length in generator.integers(8, 20, num_questions)]
    answers = [ids(ANSWER_TOKENS) for _ in range(num_questions)]
    return question_data(contexts, np.repeat(np.arange(num_contexts), QUESTIONS_OF_A_CONTEXT), questions, answers)


def write(bench: Bench, shape: Shape, tokens: int) -> dict:
    """Measure tokens per second of greedy answers; the plain way is transformers' generate, padded on the left."""
    model, vocabulary = _language_model(bench, shape)
    data = _questions(bench, vocabulary, bench.count(64, 2))
    num_new, budget = bench.count(24, 4), bench.tokens(tokens)
    num_written = write_answers(model, data, num_new, budget, bench.device)
    seconds = _seconds(bench, lambda: write_answers(model, data, num_new, budget, bench.device))
    rows = [torch.tensor(data.prompt_tokens(row)) for row in range(len(data.ids))]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left").to(bench.device)
    told = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "use_cache": True}

    def plain() -> None:
        with torch.no_grad():
            model.generate(ids, attention_mask=(ids != 0).long(), pad_token_id=0, **told)

    plain()
    plain_seconds = _seconds(bench, plain)
    waits = bench.count_waits(lambda: write_answers(model, data, num_new, budget, bench.device))
    return {
        "questions": len(data.ids),
        "written_per_s": num_written / seconds,
        "plain_written_per_s": len(rows) * num_new / plain_seconds,
        "ratio": plain_seconds / seconds,
        "waits_per_token": None if waits is None else waits / num_new,
    }


def train_writing(bench: Bench, shape: Shape, tokens: int) -> dict:
    """Time a generator's steps on questions; the five questions of each context share its tokens."""
    built = bench.built(Setup(shape, "squad", generates=True))
    budget = bench.tokens(tokens)
    data = _questions(bench, built.config.vocab_size, bench.count(400, 4))
    tokens_of_a_question = data.num_tokens(np.arange(len(data.ids))) / len(data.ids)
    batch_size = max(QUESTIONS_OF_A_CONTEXT, round(budget / tokens_of_a_question))
    steps = data.epoch_steps(batch_size, 0, 0)

    def take(step) -> torch.Tensor:
        return optimizer_step(built.engine, data, step, budget)

    bench.reset_peak()
    timed = bench.time_steps(take, steps, steps[:3])
    peak = bench.peak_bytes()
    waits = bench.count_waits(lambda: take(steps[0]))
    return figures(timed, [data.num_tokens(step) for step in steps], batch_size, built.flops) | {
        "attention": "auto",
        "checkpointing": False,
        "peak_bytes": peak,
        "waits_per_step": waits,
    }
