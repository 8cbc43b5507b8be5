"""Evaluating a model on SQuAD's questions: a span head while it is trained, any model from a folder."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from zerotune.evaluation.by_head import head_scorer
from zerotune.evaluation.folder import Items, evaluate_into
from zerotune.evaluation.options import training_description
from zerotune.evaluation.scoring import PreparedModel
from zerotune.files import default_cache_dir
from zerotune.models.final_folder import load_final_span
from zerotune.models.heads import is_encoder
from zerotune.models.model_files import read_record
from zerotune.models.pretrained import check_token_ids, most_tokens, read_config
from zerotune.settings.groups import QuestionSettings
from zerotune.squad.metrics import PredictedAnswers, QuestionScores, choose_threshold, official_scores, score_answers
from zerotune.squad.options import QuestionOptions
from zerotune.squad.question_evaluation import prepare_writing
from zerotune.squad.questions import TASK, Question
from zerotune.squad.result_files import write_question_results
from zerotune.squad.settings import resolve_questions
from zerotune.squad.span_data import SpanData
from zerotune.squad.windows import cut_windows
from zerotune.training.batches import evaluation_batches

# Of a head without a chosen threshold: no answer where "no answer" scores above the best span, as without tuning.
UNTUNED_THRESHOLD = 0.0


def span_data(tokenizer, questions: list[Question], settings: QuestionSettings, config) -> SpanData:
    """Questions tokenised for a span head, from the cache where it has them."""
    features = cut_windows(
        tokenizer, questions, not is_encoder(config), settings.max_length, settings.doc_stride, default_cache_dir()
    )
    return SpanData(questions, features, tokenizer.pad_token_id, settings.n_best, settings.max_answer_length)


def best_texts(data: SpanData, records: list[dict]) -> list[str]:
    """The best span of each question, whatever the odds of there being none; "" where it has no context."""
    return [answers[0].text if answers else "" for answers in data.answers(records)]


def choosing_values(data: SpanData, records: list[dict], choose_by: str) -> dict[str, float]:
    """eval_loss, eval_exact and eval_f1 (0-100) of the choosing split at the threshold that choose_threshold takes for
    --choose-by (for f1 where that is loss), eval_threshold, and "choose_by", where greater is better.

    Args:
        records: of all questions, as `data.scores` gives them.
    """
    odds, texts = data.null_odds(records).astype(np.float64), best_texts(data, records)
    scores = score_answers(data.questions, dict(zip(data.ids, texts, strict=True)))
    by = scores.exact if choose_by == "exact" else scores.f1
    _, threshold = choose_threshold(by, scores.has_answer, np.array([bool(text) for text in texts]), odds)
    abstains = odds > threshold
    at_threshold = QuestionScores(
        *(np.where(abstains, ~scores.has_answer, each).astype(np.float64) for each in (scores.exact, scores.f1)),
        scores.has_answer,
    )
    official = official_scores(at_threshold)
    values = {"loss": data.mean_loss(records), "exact": official["exact"], "f1": official["f1"], "threshold": threshold}
    better = -values["loss"] if choose_by == "loss" else values[choose_by]
    return {f"eval_{name}": value for name, value in values.items()} | {"choose_by": better}


def evaluate_questions(
    folder: Path, options: QuestionOptions, questions: list[Question], accelerator, stop_signal, replace: bool = False
) -> dict:
    """Load a model and evaluate it into a folder, all ranks together, as `evaluate_into` does: by its span head, or by
    what it writes. Raises Refused too where a flag is about another kind of model."""
    config = read_config(options.model, options.revision)
    prepare = _prepare_span if answers_by_span(config, options.model, options.revision) else _prepare_writing

    def write(answers: PredictedAnswers) -> dict:
        return write_question_results(folder, questions, answers, options.seed)

    def load() -> PreparedModel:
        return prepare(options, questions, config, accelerator.device)

    return evaluate_into(
        folder, options.described(), items_of(options, questions), load, write, accelerator, stop_signal, replace
    )


def items_of(options: QuestionOptions, questions: list[Question]) -> Items:
    """Return the questions of an evaluation with all that their answers depend on beside its settings."""
    return Items(TASK, [_line(question) for question in questions], {"shots": [asdict(shot) for shot in options.shots]})


def _line(question: Question) -> str:
    golds = None if question.answers is None else [answer.text for answer in question.answers]
    return f"{question.id}\t{question.text}\t{question.paragraph.context}\t{golds}"


def _prepare_span(options: QuestionOptions, questions: list[Question], config, device: torch.device) -> PreparedModel:
    """A model that answers with a span head: a final/ folder's, a published one, or an encoder's untrained one."""
    record = read_record(options.model, options.revision) or {}
    given = QuestionSettings(options.max_length, options.doc_stride, options.max_answer_length, options.n_best)
    settings = resolve_questions(given, True, most_tokens(config), record)
    model, tokenizer, _ = load_final_span(options.model_settings)
    data = span_data(tokenizer, questions, settings, config)
    check_token_ids(options.model, config, data.token_ids)
    trained = bool(record) or is_trained_span_finder(config)
    threshold = (record.get("thresholds") or {}).get("null_odds", UNTUNED_THRESHOLD)
    found = {
        "setting": "span head" if trained else "untrained head",
        "head": "span",
        **training_description(record, options.model, options.seed),
        **asdict(settings),
        "threshold": threshold,
        "num_truncated": data.num_truncated,
    }
    scorer = head_scorer(model.to(device), data, device, options.precision)
    batches = evaluation_batches(data.scored_lengths, options.tokens_per_device)

    def read(records: list[dict]) -> PredictedAnswers:
        return span_answers(data, records, threshold)

    return PreparedModel(scorer, data.scored_lengths, batches, found, read)


def _prepare_writing(
    options: QuestionOptions, questions: list[Question], config, device: torch.device
) -> PreparedModel:
    """A causal model that writes its answers: a tuned generator, or a published model after a prompt."""
    given = QuestionSettings(options.max_length, max_new_tokens=options.max_new_tokens)
    settings = resolve_questions(given, False, None, read_record(options.model, options.revision))
    return prepare_writing(options, settings.max_new_tokens, questions, config, device)


def answers_by_span(config, model: str, revision: str | None) -> bool:
    """Whether a model finds its answers with a span head; else it writes them."""
    record = read_record(model, revision)
    return record["head"] == "span" if record else is_encoder(config) or is_trained_span_finder(config)


def is_trained_span_finder(config) -> bool:
    """Whether the checkpoint was published with a span head."""
    return any(name.endswith("ForQuestionAnswering") for name in config.architectures or ())


def span_answers(data: SpanData, records: list[dict], threshold: float) -> PredictedAnswers:
    """The best span of each question, "" where the odds of no answer are above the threshold; all kept spans beside."""
    odds, spans = data.null_odds(records).astype(np.float64), data.answers(records)
    best = [each[0].text if each else "" for each in spans]
    texts = ["" if abstains else text for abstains, text in zip(odds > threshold, best, strict=True)]
    details = {"null_odds": odds.tolist(), "n_best": [[span._asdict() for span in each] for each in spans]}
    return PredictedAnswers(texts, best, odds, details)
