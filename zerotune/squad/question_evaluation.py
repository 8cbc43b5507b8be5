"""Evaluating a model that writes its answers to questions: while it is trained, and from a folder."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from zerotune.evaluation.by_prompt import LoadModel
from zerotune.evaluation.generation import answer_texts, end_tokens, write_answers
from zerotune.evaluation.options import generator_record, training_description
from zerotune.evaluation.scoring import PreparedModel, Scorer, score_items
from zerotune.models.attention import attention_kernel
from zerotune.models.branches import can_share
from zerotune.models.generator import load_language_model
from zerotune.models.parameters import published_table
from zerotune.models.precision import autocast
from zerotune.models.pretrained import load_tokenizer
from zerotune.run.plan import describe_memory, writing_memory
from zerotune.run.process import say
from zerotune.squad.generation import GenerationData, encode_questions
from zerotune.squad.metrics import PredictedAnswers, official_scores, score_answers
from zerotune.squad.options import QuestionOptions
from zerotune.squad.prompts import QuestionPrompt, fit_solved_questions, read_answer, recorded_question_prompt
from zerotune.squad.questions import Question
from zerotune.squad.settings import WRITING_DEFAULTS
from zerotune.squad.writing import GreedyWriter, writing_summary
from zerotune.tasks.prompts import uses_chat


def read_answers(tokenizer, records: list[dict]) -> list[str]:
    """Return the answer that each record's "tokens" say, "" for none."""
    return [read_answer(text) for text in answer_texts(tokenizer, records)]


def answers_scorer(
    model,
    data: GenerationData,
    tokenizer,
    max_new_tokens: int,
    device: torch.device,
    precision: str = "fp32",
    in_step: bool = False,
) -> Scorer:
    """Return what gives the "tokens" of a written answer to each question.

    A model that cannot be told which branch sees what (paragraph_branches.can_share) writes prompt by prompt.

    Args:
        precision, in_step: as GreedyWriter's.
    """
    ends = end_tokens(model, tokenizer, data.prompt.wording)
    if can_share(model.config, model.config._attn_implementation):
        return GreedyWriter(model, data, ends, max_new_tokens, device, precision, in_step)

    def score(rows: np.ndarray) -> list[dict]:
        prompts = [data.prompt_tokens(row) for row in rows]
        with autocast(device.type, precision):
            written = write_answers(model, prompts, data.pad_id, ends, max_new_tokens, device)
        return [{"tokens": tokens} for tokens in written]

    return score


def choosing_evaluation(
    engine,
    data: GenerationData,
    questions: list[Question],
    tokenizer,
    args,
    max_new_tokens: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Callable[[int], dict[str, float]]:
    """(step) -> eval_loss, the official scores of the answers that the model writes, what `writing_summary` says, and
    "choose_by", where greater is better; all ranks take part.

    Args:
        engine: zerotune.training.engine.Engine.
        data: the questions, encoded with room for max_new_tokens.
        args: tokens_per_device, choose_by ("loss", "exact", "f1").
        on_batch: called after each batch, on each rank; what it raises ends the evaluation.
    """
    accelerator = engine.accelerator
    device = accelerator.device
    loss_batches = data.loss_batches(args.tokens_per_device)
    writing_batches = data.writing_batches(args.tokens_per_device)

    def losses_of(rows: np.ndarray) -> list[dict]:
        return data.scores(engine.forward, rows, device)

    def evaluate(step: int) -> dict[str, float]:
        engine.model.eval()
        losses = score_items(losses_of, loss_batches, accelerator, on_batch=on_batch)
        stock = engine.module.stock_model
        writer = answers_scorer(
            stock, data, tokenizer, max_new_tokens, device, engine.precision, in_step=engine.deepspeed
        )
        written = score_items(writer, writing_batches, accelerator, on_batch=on_batch)
        answers = read_answers(tokenizer, written)
        scores = official_scores(score_answers(questions, dict(zip(data.ids, answers, strict=True))))
        scores = {name: score for name, score in scores.items() if not name.endswith("total")}
        values = {"loss": data.mean_loss(losses), **scores, **writing_summary(written, answers, max_new_tokens)}
        better = -values["loss"] if args.choose_by == "loss" else values[args.choose_by]
        return {f"eval_{name}": float(value) for name, value in values.items()} | {"choose_by": better}

    return evaluate


def prepare_writing(
    options: QuestionOptions,
    max_new_tokens: int,
    questions: list[Question],
    config,
    device: torch.device,
    load_model: LoadModel = load_language_model,
) -> PreparedModel:
    """A causal model that writes its answers, as published or tuned; one that was tuned is asked as it was trained.

    Args:
        options: of which shots are SolvedQuestions.
    Raises:
        Refused: before a weight is loaded, for shots or questions that do not fit the model's window.
    """
    tokenizer, window = load_tokenizer(options.model, options.revision), config.max_position_embeddings
    record = generator_record(options.model_settings)
    if record is None:
        shots, num_cut = fit_solved_questions(tokenizer, options.shots, window)
        prompt = QuestionPrompt(uses_chat(options.prompt_format, tokenizer, options.model), shots)
        described = {"setting": f"{len(shots)}-shot prompt" if shots else "zero-shot prompt", "head": "prompt"}
        described |= {"method": None, "shot_ids": [shot.id for shot in shots], "num_shots_truncated": num_cut}
    else:
        options = replace(options, load_4bit=options.load_4bit or record["method"] == "qlora")
        prompt = recorded_question_prompt(record["prompt"], options.model)
        described = {"setting": "tuned generator", "head": "generate"}
        described |= training_description(record, options.model, options.seed)
        described |= {"shot_ids": [], "num_shots_truncated": 0}
    max_length = options.max_length or (record or {}).get("max_length", WRITING_DEFAULTS.max_length)
    data = encode_questions(tokenizer, prompt, questions, max_length, window, max_new_tokens)
    data = replace(data, shares=can_share(config, attention_kernel(options.attention, config)))
    if data.num_truncated:
        say(f"{data.num_truncated:,} of {len(questions):,} contexts are cut to what matches their question best")
    batches = data.writing_batches(options.tokens_per_device)
    costs = data.writing_costs(options.tokens_per_device)
    shapes = [data.writing_shape(batch, max_new_tokens) for batch in batches]
    num_weights = published_table(config)["total"]
    say(describe_memory(writing_memory(config, options.model_settings, num_weights, len(data.head), shapes)))
    model = load_model(options.model_settings, device)
    described |= {
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "prompt_format": "chat" if prompt.chat else "plain",
        "num_shared_tokens": len(data.head),
        "num_truncated": data.num_truncated,
        "shares_paragraphs": data.shares,
    }

    def read(records: list[dict]) -> PredictedAnswers:
        texts = read_answers(tokenizer, records)
        return PredictedAnswers(texts, measured=writing_summary(records, texts, max_new_tokens))

    score = answers_scorer(model, data, tokenizer, max_new_tokens, device)
    return PreparedModel(score, costs, batches, described, read)
