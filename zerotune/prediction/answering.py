"""Answer chunks of items: by a classifier's head, the likelihood of labels, a span head, or writing.

The models are loaded and asked as in an evaluation (zerotune/evaluation, zerotune/squad/evaluation.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from zerotune.errors import Refused, listed
from zerotune.evaluation.by_head import load_head
from zerotune.evaluation.by_prompt import plan_prompt, prompt_scorer
from zerotune.evaluation.options import TextEvaluation, check_flags
from zerotune.evaluation.scoring import BackOff, PreparedModel, Scorer, is_finite
from zerotune.models.generator import TextGenerator, load_language_model
from zerotune.models.model_files import read_record
from zerotune.models.multi_label import is_multi_label
from zerotune.models.pretrained import (
    answers_by_prompt,
    check_texts,
    has_unknown_tokens,
    is_trained_classifier,
    known_labels,
    read_config,
    read_model,
)
from zerotune.prediction.inputs import Item, Reader
from zerotune.prediction.settings import PredictSettings
from zerotune.run.cpu import give_back_memory
from zerotune.settings.groups import DataSettings, ModelSettings, PromptSettings, QuestionSettings, TextSettings
from zerotune.squad.evaluation import (
    QuestionEvaluation,
    SpanFinder,
    WritingPlan,
    finds_spans,
    is_published_with_span_head,
    load_spans,
    plan_writing,
    span_lengths,
)
from zerotune.squad.evaluation import check_flags as check_question_flags
from zerotune.squad.questions import TASK as QUESTIONS
from zerotune.squad.questions import GoldAnswer, Paragraph, Question
from zerotune.squad.settings import SPAN_DEFAULTS
from zerotune.squad.spans import span_data
from zerotune.squad.writing import read_answers, writing_scorer
from zerotune.tasks.classify import OWN, check_number_of_texts, data_of_model, task_of, with_labels
from zerotune.tasks.imdb import IMDB
from zerotune.tasks.labels import check_given_labels
from zerotune.tasks.split_file import split_of_run
from zerotune.tasks.splits import Example
from zerotune.tasks.sst2 import SST2
from zerotune.tasks.texts import joined_pair
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import THRESHOLD, likely_labels, log_probabilities, log_sigmoid, logits

_TASKS = {task.name: task for task in (SST2, IMDB, OWN)}
DECIMALS = 6  # of a probability
NUM_CHECKED = 64  # prompts that are tokenised before a weight is loaded


class Answerer(Protocol):
    """A model that is known but not loaded, and how its rows are read and answered.

    Attributes:
        asks: whether items are questions with their contexts; otherwise they are texts, or pairs of texts.
        wanted: for each text of an item, the accepted names of its column.
        columns: the new columns, without --prefix.
    """

    asks: bool
    wanted: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]

    def reader(self, columns: tuple[str, ...]) -> Reader:
        """Return how the texts in these columns are read."""

    def check(self, items: list[Item]) -> None:
        """Refuse items that the model cannot read, as far as can be known before a weight is loaded."""

    def load(self, device: torch.device) -> Callable[[list[Item]], PreparedModel]:
        """Load the model, and return how a chunk is prepared."""


def answerer_of(settings: PredictSettings) -> Answerer:
    """Return the answerer of a model, chosen by the files in its folder, after all checks that need no weight.

    Raises:
        Refused: the model cannot be read, or has neither a trained head nor labels, or a flag does not fit it.
    """
    model, name = settings.model, settings.model.name
    config, record = read_config(name, model.revision), read_record(name, model.revision)
    is_causal = answers_by_prompt(config) and not is_published_with_span_head(config)
    if record is not None:
        asks = record["task"] == QUESTIONS
    else:
        asks = is_published_with_span_head(config) or (is_causal and settings.source.question is not None)
    if asks:
        config, tokenizer = read_model(model, QUESTIONS)
        return _question_answerer(settings, config, tokenizer, record)
    if record is None and not is_causal and not is_trained_classifier(config):
        raise Refused(
            f"{name} has no trained head, and its answers would be random: give a tuned model, such as a run of "
            "train/classify.py, or one that was published with a head"
        )
    config, tokenizer = read_model(model, OWN.name if record is None else record["task"])
    return _label_answerer(settings, config, tokenizer, record)


def answer_chunk(answering: PreparedModel, device: torch.device, is_stopped: Callable[[], bool]) -> list[dict] | None:
    """Return the new columns of a chunk's items; None if the run is asked to stop meanwhile.

    Raises:
        Refused: scores are not finite, or a single item does not fit in memory.
    """
    score, found = BackOff(answering.score, answering.costs), {}
    with torch.no_grad():
        for batch in answering.batches:
            if is_stopped():
                return None
            found |= zip(batch.tolist(), score(batch), strict=True)
            if device.type == "cpu":
                give_back_memory()
    records = [found[item] for item in range(len(found))]
    if not all(map(is_finite, records)):
        raise Refused(
            "the model gives scores that are not finite: its weights are damaged, or the --precision is too narrow: "
            "try fp32"
        )
    return answering.read(records)


# --- labels ---


def label_columns(scores: np.ndarray, labels: tuple[str, ...], top_k: int) -> list[dict]:
    """Return the new columns of texts, given the labels' natural log-probabilities, [texts, labels]."""
    probabilities = np.exp(scores.astype(np.float64))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    found = []
    for row, places in zip(probabilities, order.tolist(), strict=True):
        ranked = [{"label": labels[place], "probability": round(float(row[place]), DECIMALS)} for place in places]
        columns = {"prediction": ranked[0]["label"], "probability": ranked[0]["probability"]}
        found.append(columns | ({"top_k": ranked} if top_k > 1 else {}))
    return found


def label_set_columns(
    scores: np.ndarray, labels: tuple[str, ...], top_k: int, separator: str, threshold: float
) -> list[dict]:
    """Return the new columns of texts that have any number of labels, given each label's own log-probability.

    The prediction is the labels above the threshold, joined by the separator. Its probability is that of exactly these
    labels, taking them as independent.

    Args:
        scores: [texts, labels].
    """
    ranked = label_columns(scores, labels, top_k)
    found = []
    for row, chosen, columns in zip(
        np.exp(scores.astype(np.float64)), likely_labels(scores, threshold), ranked, strict=True
    ):
        probability = round(float(np.where(chosen, row, 1 - row).prod()), DECIMALS)
        names = separator.join(labels[place] for place in np.flatnonzero(chosen))
        found.append(columns | {"prediction": names, "probability": probability})
    return found


def separator_for(labels: tuple[str, ...], usual: str) -> str:
    """Return the separator of labels in a cell: the usual one, or another if a label contains it."""
    return next((each for each in (usual, ";", "|", " / ") if not any(each in label for label in labels)), usual)


@dataclass(frozen=True)
class LabelAnswerer:
    """A model that gives each text a label: by a head, or by the likelihood of the labels after a prompt.

    Attributes:
        threshold: for a model that gives any number of labels, the probability above which a text has one.
    """

    settings: PredictSettings
    evaluation: TextEvaluation
    task: object
    config: object
    tokenizer: object
    threshold: float = THRESHOLD
    asks: bool = False

    @property
    def wanted(self) -> tuple[tuple[str, ...], ...]:
        """The accepted names of the column of each text."""
        if self.settings.source.columns:
            return tuple((name,) for name in self.settings.source.columns)
        return (self.task.text_columns, *([(self.task.pair_column,)] if self.task.pair_column else []))

    @property
    def columns(self) -> tuple[str, ...]:
        """The new columns."""
        return ("prediction", "probability", *(["top_k"] if self.settings.top_k > 1 else []))

    def reader(self, columns: tuple[str, ...]) -> Reader:
        """Return how the texts in these columns are read."""
        clean = self.task.clean or (lambda text: text)
        return Reader(columns, tuple(lambda text: clean(text.strip()).strip() for _ in columns))

    def check(self, items: list[Item]) -> None:
        """Refuse texts with a token that has no embedding, and prompts that do not fit or cannot be tokenised."""
        _check_texts(self.evaluation.model, self.config, self.tokenizer, items)
        if answers_by_prompt(self.config):
            plan = plan_prompt(self.evaluation, self.task, self.config, self.tokenizer)
            plan.encode(texts=[self._example(item).text for item in items[:NUM_CHECKED]])

    def _example(self, item: Item) -> Example:
        first, *second = item.texts
        if not second:
            return Example(item.where, first, None)
        names = self.task.pair_columns or tuple(names[0] for names in self.wanted)
        return Example(item.where, joined_pair(names, item.texts), None, pair=item.texts)

    def load(self, device: torch.device) -> Callable[[list[Item]], PreparedModel]:
        """Load the model, and return how a chunk is prepared."""
        if answers_by_prompt(self.config):
            return self._load_prompt(device)
        classifier = load_head(self.evaluation, self.task, self.config, device)

        def prepare(items: list[Item]) -> PreparedModel:
            data = classifier.data(list(map(self._example, items)), cached=False)
            return self._answering(classifier.scorer(data, device), data.lengths)

        return prepare

    def _load_prompt(self, device: torch.device) -> Callable[[list[Item]], PreparedModel]:
        plan = plan_prompt(self.evaluation, self.task, self.config, self.tokenizer)
        model = load_language_model(plan.settings, device)
        checks = has_unknown_tokens(self.config, self.tokenizer)

        def prepare(items: list[Item]) -> PreparedModel:
            if checks:
                _check_texts(plan.settings, self.config, self.tokenizer, items)
            data = plan.checked(plan.encode(texts=[self._example(item).text for item in items]), self.config)
            return self._answering(prompt_scorer(model, data, device), data.lengths)

        return prepare

    def _answering(self, score: Scorer, lengths: np.ndarray) -> PreparedModel:
        def read(records: list[dict]) -> list[dict]:
            labels, top_k = self.task.labels, self.settings.top_k
            if not self.task.multi_label:
                return label_columns(log_probabilities(records), labels, top_k)
            scores, separator = log_sigmoid(logits(records)), separator_for(labels, self.task.label_separator)
            return label_set_columns(scores, labels, top_k, separator, self.threshold)

        return PreparedModel(score, lengths, evaluation_batches(lengths, self.settings.tokens_per_device), {}, read)


def _label_answerer(settings: PredictSettings, config, tokenizer, record: dict | None) -> LabelAnswerer:
    name = settings.model.name
    known = known_labels(settings.model, config)
    if known is not None and settings.labels is not None:
        raise Refused(f"--labels is for a model without labels, and {name} has {listed(known)}: leave it out")
    labels = known or settings.labels
    if labels is None:
        raise Refused(
            f"{name} is a causal model without a head: name the labels that it chooses from, --labels spam ham, or ask "
            "a --question about a --context"
        )
    check_given_labels(labels)
    if settings.top_k > len(labels):
        raise Refused(f"--top-k {settings.top_k} is more than the {len(labels)} labels of {name}: lower it")
    task = _TASKS.get(record["task"], OWN) if record else OWN
    if task.name == OWN.name:
        of_run = data_of_model(record, split_of_run(name, OWN.name)) or DataSettings()
        of_run = replace(of_run, multi_label=of_run.multi_label or is_multi_label(config))
        task = with_labels(task_of(of_run), tuple(labels))
    if record and settings.source.columns:
        check_number_of_texts(settings.source.columns, task)
    evaluation = TextEvaluation(
        model=settings.model,
        text=TextSettings(settings.max_length),
        prompt=PromptSettings(format=settings.prompt_format),
        tokens_per_device=settings.tokens_per_device,
    )
    check_flags(evaluation, config, tokenizer)
    threshold = ((record or {}).get("thresholds") or {}).get("probability", THRESHOLD)
    return LabelAnswerer(settings, evaluation, task, config, tokenizer, threshold)


def _check_texts(model: ModelSettings, config, tokenizer, items: list[Item]) -> None:
    check_texts(model.name, config, tokenizer, (text for item in items for text in item.texts))


# --- questions ---


@dataclass(frozen=True)
class QuestionAnswerer:
    """A model that answers questions about contexts: it finds a span, or writes the answer."""

    settings: PredictSettings
    evaluation: QuestionEvaluation
    config: object
    tokenizer: object
    asks: bool = True

    @property
    def wanted(self) -> tuple[tuple[str, ...], ...]:
        """The accepted names of the columns of question and context."""
        return tuple((name,) for name in self.settings.source.columns or ("question", "context"))

    @property
    def columns(self) -> tuple[str, ...]:
        """The new columns."""
        names = ("prediction", "probability", "no_answer_probability")
        return (*names, *(["top_k"] if self.settings.top_k > 1 else []))

    def reader(self, columns: tuple[str, ...]) -> Reader:
        """Return how questions and contexts are read; contexts are not stripped, so that starts count in them."""
        return Reader(columns, (str.strip, str))

    def check(self, items: list[Item]) -> None:
        """Refuse texts with a token that has no embedding, and questions that leave no room for their context."""
        _check_texts(self.evaluation.model, self.config, self.tokenizer, items)
        first = _questions(items[:NUM_CHECKED])
        if finds_spans(self.config, self.evaluation.model):
            span_data(self.tokenizer, first, span_lengths(self.evaluation, self.config), self.config, cached=False)
        else:
            plan_writing(self.evaluation, self.config).encode(first)

    def load(self, device: torch.device) -> Callable[[list[Item]], PreparedModel]:
        """Load the model, and return how a chunk is prepared."""
        budget, top_k = self.settings.tokens_per_device, self.settings.top_k
        if finds_spans(self.config, self.evaluation.model):
            finder = load_spans(self.evaluation, self.config, device)
            return lambda items: _finding(finder, _questions(items), device, budget, top_k)
        plan = plan_writing(self.evaluation, self.config)
        model = load_language_model(plan.settings, device)
        return lambda items: _writing(plan, model, _questions(items), device, budget)


def _question_answerer(settings: PredictSettings, config, tokenizer, record: dict | None) -> QuestionAnswerer:
    name, columns = settings.model.name, settings.source.columns
    if settings.labels is not None:
        raise Refused(f"--labels is for texts, and {name} is asked questions: leave it out")
    if columns is not None and len(columns) != 2:
        raise Refused(
            f"--text-column {columns[0]}: {name} is asked questions: name the columns of question and context"
        )
    spans, top_k = finds_spans(config, settings.model), settings.top_k
    if top_k > 1 and not spans:
        raise Refused(f"--top-k {top_k}: {name} writes one answer to each question: leave it out")
    n_best = top_k if spans and top_k > (record or {}).get("n_best", SPAN_DEFAULTS.n_best) else None
    evaluation = QuestionEvaluation(
        model=settings.model,
        questions=QuestionSettings(max_length=settings.max_length, n_best=n_best),
        prompt=PromptSettings(format=settings.prompt_format),
        tokens_per_device=settings.tokens_per_device,
    )
    check_question_flags(evaluation, config, tokenizer)
    return QuestionAnswerer(settings, evaluation, config, tokenizer)


def _questions(items: list[Item]) -> list[Question]:
    """Return questions; those about the same context share a paragraph."""
    paragraphs = {context: Paragraph("", 0, context) for _, context in (item.texts for item in items)}
    return [Question(item.where, item.texts[0], paragraphs[item.texts[1]], None) for item in items]


def _finding(
    finder: SpanFinder, questions: list[Question], device: torch.device, budget: int, top_k: int
) -> PreparedModel:
    data = finder.data(questions, cached=False)

    def read(records: list[dict]) -> list[dict]:
        abstains = data.null_odds(records) > finder.threshold
        nulls = [record["null"] for record in records]
        return [
            span_columns(null, spans, is_none, top_k)
            for null, spans, is_none in zip(nulls, data.n_best(records), abstains.tolist(), strict=True)
        ]

    costs = data.scored_lengths
    return PreparedModel(finder.scorer(data, device), costs, evaluation_batches(costs, budget), {}, read)


def span_columns(null: float, spans: list[dict], abstains: bool, top_k: int) -> dict:
    """Return the new columns of a question.

    Probabilities are the softmax of the scores of "no answer" and of the n best spans, as in Devlin et al. 2019 (and
    transformers' run_qa.py).

    Args:
        null: score of "no answer".
        spans: the n best, best first, as `SpanData.n_best` gives them.
        abstains: whether the null odds are above the model's threshold.
    """
    scores = np.array([null, *(span["score"] for span in spans)], np.float64)
    weights = np.exp(scores - scores.max())
    none, *found = (round(float(value), DECIMALS) for value in weights / weights.sum())
    abstains = abstains or not spans
    columns = {
        "prediction": "" if abstains else spans[0]["text"],
        "probability": none if abstains else found[0],
        "no_answer_probability": none,
    }
    if top_k > 1:
        ranked = zip(spans[:top_k], found, strict=False)
        columns["top_k"] = [
            {"answer": span["text"], "start": span["start"], "probability": value} for span, value in ranked
        ]
    return columns


def _writing(plan: WritingPlan, model, questions: list[Question], device: torch.device, budget: int) -> PreparedModel:
    data, tokenizer = plan.encode(questions), plan.tokenizer
    write = writing_scorer(model, data, tokenizer, plan.lengths.max_new_tokens, device)
    forward = TextGenerator(model)

    def score(rows: np.ndarray) -> list[dict]:
        """Write the answers, then compute the loss of each and of "no answer" in another pass."""
        records = write(rows)
        asked = [questions[row] for row in rows]
        answered = [
            replace(question, answers=(GoldAnswer(text, 0),) if text else ())
            for question, text in zip(asked, read_answers(tokenizer, records), strict=True)
        ]
        both = plan.encode([*answered, *(replace(question, answers=()) for question in asked)])
        losses = np.empty(2 * len(rows))
        for batch in both.loss_batches(budget):
            losses[batch] = [record["loss"] for record in both.scores(forward, batch, device)]
        pairs = losses.reshape(2, -1).T.tolist()
        return [
            record | {"loss": own, "no_answer_loss": none} for record, (own, none) in zip(records, pairs, strict=True)
        ]

    def read(records: list[dict]) -> list[dict]:
        return [
            {
                "prediction": text,
                "probability": round(math.exp(-record["loss"]), DECIMALS),
                "no_answer_probability": round(math.exp(-record["no_answer_loss"]), DECIMALS),
            }
            for text, record in zip(read_answers(tokenizer, records), records, strict=True)
        ]

    return PreparedModel(score, data.writing_costs(budget), data.writing_batches(budget), {}, read)
