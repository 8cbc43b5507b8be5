"""Training on SQuAD v2: the parts that are specific to its two heads, which find spans or write answers."""

from dataclasses import asdict, replace

import numpy as np

from zerotune.errors import Refused
from zerotune.evaluation.validation import score_validation
from zerotune.models.attention import attention_kernel
from zerotune.models.branches import can_share
from zerotune.models.packed import packs_rows
from zerotune.models.pretrained import check_generator, check_texts, most_tokens, read_names_as_text
from zerotune.run.process import say
from zerotune.run.stopping import StopSignal
from zerotune.settings.groups import OptimisationSettings, QuestionSettings, TrainSettings
from zerotune.squad.generation import GenerationData, encode_questions
from zerotune.squad.metrics import QuestionScores, choose_threshold, official_scores, score_answers
from zerotune.squad.prompts import QuestionPrompt, question_prompt_record
from zerotune.squad.questions import TASK, Question, question_texts
from zerotune.squad.settings import refuse_other_heads_flags, resolve_questions
from zerotune.squad.spans import SpanData, span_data
from zerotune.squad.writing import read_answers, writing_scorer, writing_summary
from zerotune.tasks.prompts import uses_chat
from zerotune.tasks.splits import Splits
from zerotune.training.batches import evaluation_batches
from zerotune.training.engine import Engine
from zerotune.training.generation import format_in_training


def check_head(settings: TrainSettings, config, tokenizer) -> QuestionSettings:
    """Refuse a head that the model cannot have, and flags of the other head.

    Returns:
        The lengths of windows, or of prompts and answers, with the defaults filled in.
    """
    is_span_head, name = settings.head == "span", settings.model.name
    refuse_other_heads_flags(settings.questions, settings.prompt, is_span_head, f"--head {settings.head}")
    if not is_span_head:
        check_generator(name, config, settings.optimisation.head_learning_rate, "span")
        if settings.model.attention == "varlen":
            raise Refused("--attention varlen is for --head span: written answers are padded; use --attention auto")
        uses_chat(format_in_training(settings.prompt.format, settings.model), tokenizer, name)
    return resolve_questions(settings.questions, is_span_head, most_tokens(config))


def tokenise(
    settings: TrainSettings, lengths: QuestionSettings, splits: Splits, config, tokenizer
) -> dict[str, SpanData] | dict[str, GenerationData]:
    """Tokenise the training and validation splits for the run's head; the tokens of windows are cached.

    Args:
        lengths: as `check_head` returns them.
    Raises:
        Refused: a token has no embedding, in the test split too; also as `span_data` and `encode_questions`.
    """
    every = [*splits.train, *splits.validation, *splits.test]
    check_texts(settings.model.name, config, tokenizer, question_texts(every))
    parts = {"train": splits.train, "validation": splits.validation}
    if settings.head == "span":
        read_names_as_text(tokenizer)
        spans = {name: span_data(tokenizer, questions, lengths, config) for name, questions in parts.items()}
        if spans["train"].windows.num_lost:
            say(f"train: {spans['train'].windows.num_lost:,} answers fit whole in no window and are not trained on")
        packs = packs_rows(settings.model, config, trains=True)
        return {name: replace(part, packs=packs) for name, part in spans.items()}
    wanted = format_in_training(settings.prompt.format, settings.model)
    prompt = QuestionPrompt(uses_chat(wanted, tokenizer, settings.model.name))
    num_positions = most_tokens(config)
    shares = can_share(config, attention_kernel(settings.model.attention, config))
    num_new_tokens = {"train": 0, "validation": lengths.max_new_tokens}
    return {
        name: replace(
            encode_questions(tokenizer, prompt, part, lengths.max_length, num_positions, num_new_tokens[name]),
            shares=shares,
        )
        for name, part in parts.items()
    }


def tokenise_for_plan(settings: TrainSettings, task: str, splits: Splits, config, tokenizer) -> dict:
    """Call `tokenise` with the lengths of `check_head`."""
    del task
    return tokenise(settings, check_head(settings, config, tokenizer), splits, config, tokenizer)


def validate_spans(
    engine: Engine, data: SpanData, rule: str, optimisation: OptimisationSettings, stop_signal: StopSignal
) -> dict[str, float]:
    """Return loss, exact and f1 (0-100) of the validation split, and the threshold at which they are reached.

    The threshold of the null odds is the best one for --choose-by, or for f1 if that is loss. All ranks take part.

    Args:
        rule: how the rows were split. "official": the test set is separate from the questions that validation is drawn
            from, and half of it has no answer, as in SQuAD v2's dev set; otherwise both have the same share.
    Raises:
        Preempted: a rank was asked to stop.
    """
    batches = evaluation_batches(data.scored_lengths, optimisation.tokens_per_device)
    records = score_validation(engine, data, batches, stop_signal)
    return span_values(data, records, optimisation.choose_by, kinds_weigh_same=rule == "official")


def span_values(data: SpanData, records: list[dict], choose_by: str, kinds_weigh_same: bool) -> dict[str, float]:
    """Return loss, exact, f1 and threshold from all questions' records, as `validate_spans` does."""
    odds, texts = data.null_odds(records), data.best_texts(records)
    scores = score_answers(data.questions, dict(zip(data.ids, texts, strict=True)))
    values = scores.exact if choose_by == "exact" else scores.f1
    predicts = np.array([bool(text) for text in texts])
    _, threshold = choose_threshold(values, scores.has_answer, predicts, odds, kinds_weigh_same)
    exact, f1 = (
        np.where(odds > threshold, ~scores.has_answer, each).astype(np.float64) for each in (scores.exact, scores.f1)
    )
    official = official_scores(QuestionScores(exact, f1, scores.has_answer))
    return {
        "loss": data.mean_loss(records),
        "exact": official["exact"],
        "f1": official["f1"],
        "threshold": threshold,
    }


def validate_written(
    engine: Engine,
    data: GenerationData,
    questions: list[Question],
    tokenizer,
    max_new_tokens: int,
    optimisation: OptimisationSettings,
    stop_signal: StopSignal,
) -> dict[str, float]:
    """Return the loss of the validation split's gold answers, and the official scores of the written ones.

    The result also has the written ones' `writing_summary`. All ranks take part.

    Args:
        data: the questions, tokenised with room for `max_new_tokens`.
    Raises:
        Preempted: a rank was asked to stop.
    """
    device, budget = engine.accelerator.device, optimisation.tokens_per_device
    losses = score_validation(engine, data, data.loss_batches(budget), stop_signal, "validation, loss")
    in_step = engine.deepspeed and engine.model.zero_optimization_stage() == 3
    score = writing_scorer(
        engine.module.stock_model, data, tokenizer, max_new_tokens, device, engine.precision, in_step=in_step
    )
    batches = data.writing_batches(budget)
    written = score_validation(engine, data, batches, stop_signal, "validation, answers", score)
    answers = read_answers(tokenizer, written)
    scores = official_scores(score_answers(questions, dict(zip(data.ids, answers, strict=True))))
    scores = {name: float(score) for name, score in scores.items() if not name.endswith("total")}
    return {"loss": data.mean_loss(losses)} | scores | writing_summary(written, answers, max_new_tokens)


def task_record(
    settings: TrainSettings, lengths: QuestionSettings, train: SpanData | GenerationData, best: dict
) -> dict:
    """Return task.json's entries about the task.

    Args:
        best: the line of metrics.jsonl for the best checkpoint's evaluation.
    """
    record = {"task": TASK, "head": settings.head, "labels": None}
    if settings.head == "span":
        record |= {"prompt": None, "thresholds": {"null_odds": best.get("eval_threshold")}}
    else:
        record |= {"prompt": question_prompt_record(train.prompt), "thresholds": None}
    return record | {name: length for name, length in asdict(lengths).items() if length is not None}
