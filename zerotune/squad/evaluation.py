"""Evaluate a model on SQuAD v2 into a folder, by the spans that it finds or the answers that it writes."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zerotune.evaluation.by_head import head_scorer
from zerotune.evaluation.folder import Items, check_earlier, evaluate_before_training, evaluate_into
from zerotune.evaluation.options import (
    ModelEvaluation,
    base_model,
    check_own_prompt,
    training_description,
    tuned_model,
)
from zerotune.evaluation.scoring import PreparedModel, Scorer
from zerotune.models.attention import attention_kernel, check_kernel_precision
from zerotune.models.branches import can_share
from zerotune.models.divided import divided_where_large, onto_device
from zerotune.models.final_folder import load_final_span
from zerotune.models.generator import load_language_model
from zerotune.models.heads import is_encoder
from zerotune.models.loading import read_onto
from zerotune.models.model_files import generator_record, read_record
from zerotune.models.packed import packs_rows, use_packed_attention
from zerotune.models.parameters import published_table
from zerotune.models.pretrained import check_texts, check_token_ids, load_tokenizer, most_tokens, read_config
from zerotune.models.span_head import SpanModel
from zerotune.run.folder import RunFolder
from zerotune.run.plan import describe_memory, writing_memory
from zerotune.run.process import say
from zerotune.settings.groups import ModelSettings, PromptSettings, QuestionSettings, TrainSettings
from zerotune.squad.generation import GenerationData, encode_questions
from zerotune.squad.metrics import PredictedAnswers
from zerotune.squad.prompts import QuestionPrompt, fit_solved_questions, recorded_question_prompt
from zerotune.squad.questions import TASK, Question, question_texts
from zerotune.squad.report import score_line, write_question_results
from zerotune.squad.settings import refuse_other_heads_flags, resolve_questions
from zerotune.squad.spans import SpanData, span_data
from zerotune.squad.splits import first_paragraphs
from zerotune.squad.writing import read_answers, writing_scorer, writing_summary
from zerotune.tasks.prompts import uses_chat
from zerotune.tasks.split_file import reporting_sha256
from zerotune.tasks.splits import TEST_LIMIT, Splits
from zerotune.training.batches import evaluation_batches

# Used without a threshold from a validation split: there is no answer if the null score is above the best span's.
UNTUNED_THRESHOLD = 0.0
BASE_EVAL_QUESTIONS = 1000


@dataclass(frozen=True, kw_only=True)
class QuestionEvaluation(ModelEvaluation):
    """How a model is evaluated on SQuAD v2.

    Attributes:
        questions: lengths; those that are None come from the model folder, or else from the defaults.
    """

    questions: QuestionSettings

    def described(self) -> dict:
        """Return the settings as entries of metrics.json."""
        return super().described() | asdict(self.questions)


def evaluate(
    folder: Path,
    evaluation: QuestionEvaluation,
    questions: list[Question],
    accelerator,
    stop_signal,
    overwrite: bool = False,
) -> dict:
    """Load a model and evaluate it into a folder, all ranks together, as `evaluate_into` does.

    Models with a span head and encoders, whose head may be untrained, find spans; other causal models write.

    Returns:
        The content of metrics.json.
    """
    config = read_config(evaluation.model.name, evaluation.model.revision)
    by_spans = finds_spans(config, evaluation.model)

    def prepare() -> PreparedModel:
        model = divided_where_large(evaluation.model, config, not by_spans, accelerator)
        loaded = replace(evaluation, model=model)
        return (prepare_spans if by_spans else prepare_writing)(loaded, questions, config, accelerator.device)

    def write(predicted: PredictedAnswers) -> dict:
        return write_question_results(folder, questions, predicted, evaluation.seed)

    described, items = evaluation.described(), question_items(evaluation, questions)
    return evaluate_into(folder, described, items, prepare, write, accelerator, stop_signal, overwrite)


def check_evaluation(
    folder: Path, evaluation: QuestionEvaluation, questions: list[Question], config, tokenizer
) -> None:
    """Refuse flags and texts that do not suit this model, and a folder with the results of another evaluation."""
    check_flags(evaluation, config, tokenizer)
    check_texts(evaluation.model.name, config, tokenizer, question_texts(questions))
    check_earlier(folder, evaluation.described(), question_items(evaluation, questions))


def check_flags(evaluation: QuestionEvaluation, config, tokenizer) -> None:
    """Refuse flags that this model would ignore or cannot follow."""
    model, prompt = evaluation.model, evaluation.prompt
    attention_kernel(model.attention, config)
    check_kernel_precision(model.attention, model.precision)
    if finds_spans(config, model):
        refuse_other_heads_flags(evaluation.questions, prompt, True, f"{model.name}, which answers with a span head,")
        span_lengths(evaluation, config)
    else:
        refuse_other_heads_flags(evaluation.questions, prompt, False, f"{model.name}, which writes its answers,")
        record = generator_record(model)
        if record is None:
            uses_chat(prompt.format, tokenizer, model.name)
        else:
            check_own_prompt(evaluation, record)


def question_items(evaluation: QuestionEvaluation, questions: list[Question]) -> Items:
    """Return the questions of an evaluation with everything besides its settings that their answers depend on."""
    lines = []
    for question in questions:
        golds = None if question.answers is None else [answer.text for answer in question.answers]
        lines.append(f"{question.id}\t{question.text}\t{question.paragraph.context}\t{golds}")
    return Items(TASK, lines, {"shots": [asdict(shot) for shot in evaluation.shots]})


# --- models that find spans ---


def finds_spans(config, model: ModelSettings) -> bool:
    """Return whether a model answers with a span head; otherwise it writes its answers."""
    record = read_record(model.name, model.revision)
    return record["head"] == "span" if record else is_encoder(config) or is_published_with_span_head(config)


def is_published_with_span_head(config) -> bool:
    """Return whether a checkpoint was published with a span head."""
    return any(name.endswith("ForQuestionAnswering") for name in config.architectures or ())


@dataclass(frozen=True)
class SpanFinder:
    """A model with a span head on its device, and how it reads questions.

    Attributes:
        config: of the checkpoint.
        settings: those that it was loaded with.
        record: task.json, {} for a model that zerotune did not tune.
        lengths: resolved.
        threshold: there is no answer if the null odds are above it.
    """

    model: SpanModel
    tokenizer: Any
    config: Any
    settings: ModelSettings
    record: dict
    lengths: QuestionSettings
    threshold: float

    def data(self, questions: list[Question], cached: bool = True) -> SpanData:
        """Tokenise questions. Raises Refused as `span_data`, and for a token without an embedding."""
        found = span_data(self.tokenizer, questions, self.lengths, self.config, cached)
        check_token_ids(self.settings.name, self.config, found.token_ids)
        return replace(found, packs=packs_rows(self.settings, self.config, trains=False))

    def scorer(self, data: SpanData, device: torch.device) -> Scorer:
        """Return a scorer of tokenised questions."""
        return head_scorer(self.model, data, device, self.settings.precision)


def span_lengths(evaluation: QuestionEvaluation, config) -> QuestionSettings:
    """Resolve the lengths of a model with a span head. Raises Refused if --max-length is too long for it."""
    record = read_record(evaluation.model.name, evaluation.model.revision)
    return resolve_questions(evaluation.questions, True, most_tokens(config), record)


def load_spans(evaluation: QuestionEvaluation, config, device: torch.device) -> SpanFinder:
    """Load a model with a span head: a final/ folder's, a published one, or an encoder's untrained one."""
    loaded = evaluation.model
    record, lengths = read_record(loaded.name, loaded.revision) or {}, span_lengths(evaluation, config)
    model, tokenizer, _ = load_final_span(read_onto(loaded, device, evaluates=True))
    if packs_rows(loaded, config, trains=False):
        use_packed_attention(model.stock_model)
    threshold = (record.get("thresholds") or {}).get("null_odds", UNTUNED_THRESHOLD)
    model = onto_device(model, model.stock_model, loaded, device)
    return SpanFinder(model, tokenizer, config, loaded, record, lengths, threshold)


def prepare_spans(
    evaluation: QuestionEvaluation, questions: list[Question], config, device: torch.device
) -> PreparedModel:
    """Load a model with a span head, and prepare it for questions."""
    finder = load_spans(evaluation, config, device)
    data, threshold = finder.data(questions), finder.threshold
    is_trained = bool(finder.record) or is_published_with_span_head(config)
    description = {
        "setting": "span head" if is_trained else "untrained head",
        "head": "span",
        **training_description(finder.record, finder.settings.name, evaluation.seed),
        **asdict(finder.lengths),
        "threshold": threshold,
        "num_truncated": data.num_truncated,
    }
    return PreparedModel(
        score=finder.scorer(data, device),
        costs=data.scored_lengths,
        batches=evaluation_batches(data.scored_lengths, evaluation.tokens_per_device),
        description=description,
        read=span_reader(data, threshold),
        in_step=evaluation.model.divides_layers,
    )


def span_reader(data: SpanData, threshold: float) -> Callable[[list[dict]], PredictedAnswers]:
    """Return a function that reads the answers from all questions' records.

    The answer is the best span, or "" if the null odds are above the threshold; predictions.jsonl keeps the n best.
    """

    def read(records: list[dict]) -> PredictedAnswers:
        odds, best = data.null_odds(records), data.best_texts(records)
        texts = ["" if abstains else text for abstains, text in zip(odds > threshold, best, strict=True)]
        return PredictedAnswers(texts, best, odds, {"null_odds": odds.tolist(), "n_best": data.n_best(records)})

    return read


# --- models that write ---


def prepare_writing(
    evaluation: QuestionEvaluation,
    questions: list[Question],
    config,
    device: torch.device,
    load_model: Callable[[ModelSettings, torch.device], torch.nn.Module] = load_language_model,
) -> PreparedModel:
    """Load a causal model that writes its answers, as published or tuned; a tuned one is asked as in its training.

    Raises:
        Refused: shots or questions do not fit the model's positions; found before any weight is loaded.
    """
    plan = plan_writing(evaluation, config)
    loaded, tokenizer, num_new_tokens = plan.settings, plan.tokenizer, plan.lengths.max_new_tokens
    data = plan.encode(questions)
    if data.num_truncated:
        say(f"{data.num_truncated:,} of {len(questions):,} contexts are cut to what matches their question best")
    batches = data.writing_batches(evaluation.tokens_per_device)
    sizes = [data.writing_shape(batch, num_new_tokens) for batch in batches]
    memory = writing_memory(config, loaded, published_table(config), len(data.prefix), sizes)
    say(f"evaluation, {describe_memory(memory)}")
    description = plan.description | {
        "num_shared_tokens": len(data.prefix),
        "num_truncated": data.num_truncated,
        "shares_paragraphs": data.shares,
    }
    model = load_model(loaded, device)

    def read(records: list[dict]) -> PredictedAnswers:
        texts = read_answers(tokenizer, records)
        return PredictedAnswers(texts, measured=writing_summary(records, texts, num_new_tokens))

    return PreparedModel(
        score=writing_scorer(model, data, tokenizer, num_new_tokens, device, in_step=loaded.divides_layers),
        costs=data.writing_costs(evaluation.tokens_per_device),
        batches=batches,
        description=description,
        read=read,
        in_step=loaded.divides_layers,
    )


def describe_batches(evaluation: QuestionEvaluation, questions: list[Question], config) -> list[str]:
    """Return lines about the questions, the prompt, the batches and the memory of an evaluation."""
    lines = [f"questions: {len(questions):,}"]
    most = f"of at most {evaluation.tokens_per_device:,} padded tokens"
    if finds_spans(config, evaluation.model):
        tokenizer = load_tokenizer(evaluation.model.name, evaluation.model.revision)
        data = span_data(tokenizer, questions, span_lengths(evaluation, config), config)
        batches = evaluation_batches(data.scored_lengths, evaluation.tokens_per_device)
        return [*lines, f"batches: {len(batches):,} {most}, by a span head"]
    plan = plan_writing(evaluation, config)
    data, num_new_tokens = plan.encode(questions), plan.lengths.max_new_tokens
    batches = data.writing_batches(evaluation.tokens_per_device)
    sizes = [data.writing_shape(batch, num_new_tokens) for batch in batches]
    memory = writing_memory(config, plan.settings, published_table(config), len(data.prefix), sizes)
    return [
        *lines,
        f"prompt: {plan.description['setting']}, {len(data.prefix):,} tokens shared by all, {data.num_truncated:,} cut",
        f"batches: {len(batches):,} {most}, {num_new_tokens} new tokens in an answer at most",
        describe_memory(memory),
    ]


@dataclass(frozen=True)
class WritingPlan:
    """How a causal model is asked to write answers, planned before any weight is loaded.

    Attributes:
        config: of the checkpoint.
        settings: those to load the model with.
        lengths: resolved.
        description: its entries in metrics.json.
    """

    tokenizer: Any
    config: Any
    prompt: QuestionPrompt
    settings: ModelSettings
    lengths: QuestionSettings
    description: dict

    def encode(self, questions: list[Question]) -> GenerationData:
        """Tokenise questions with room for their answers. Raises Refused for one too long or with an unknown token."""
        lengths, positions = self.lengths, most_tokens(self.config)
        data = encode_questions(
            self.tokenizer, self.prompt, questions, lengths.max_length, positions, lengths.max_new_tokens
        )
        check_token_ids(self.settings.name, self.config, data.token_ids)
        return replace(data, shares=can_share(self.config, attention_kernel(self.settings.attention, self.config)))


def plan_writing(evaluation: QuestionEvaluation, config) -> WritingPlan:
    """Plan how a causal model writes its answers, as published or tuned; a tuned one is asked as in its training.

    Raises:
        Refused: shots do not fit the model's positions.
    """
    loaded, record = evaluation.model, generator_record(evaluation.model)
    lengths = resolve_questions(evaluation.questions, False, None, record)
    tokenizer, num_positions = load_tokenizer(loaded.name, loaded.revision), most_tokens(config)
    if record is None:
        shots, num_cut = fit_solved_questions(tokenizer, evaluation.shots, num_positions)
        chat = uses_chat(evaluation.prompt.format, tokenizer, loaded.name)
        prompt = QuestionPrompt(chat, shots, ends_with_line=not chat)
        description = {"setting": f"{len(shots)}-shot prompt" if shots else "zero-shot prompt", "head": "prompt"}
        description |= {"method": None, "shot_ids": [shot.id for shot in shots], "num_shots_truncated": num_cut}
    else:
        if record["method"] == "qlora":
            loaded = replace(loaded, method="qlora")
        prompt = recorded_question_prompt(record["prompt"], loaded.name)
        description = {"setting": "tuned generator", "head": "generate"}
        description |= training_description(record, loaded.name, evaluation.seed)
        description |= {"shot_ids": [], "num_shots_truncated": 0}
    description |= {
        "max_length": lengths.max_length,
        "max_new_tokens": lengths.max_new_tokens,
        "prompt_format": "chat" if prompt.chat else "plain",
    }
    return WritingPlan(tokenizer, config, prompt, loaded, lengths, description)


# --- before and after training ---


def evaluate_base(run: RunFolder, settings: TrainSettings, splits: Splits, stop_signal) -> None:
    """Evaluate the model into eval/base before training.

    A causal model writes its answers after a prompt, even if a span head will be trained; an encoder uses an untrained
    span head.
    """
    if settings.run.base_eval == "none":
        return
    questions, model, lengths = splits.test, base_model(settings.model), settings.questions
    if settings.run.base_eval == "subset":
        questions = first_paragraphs(questions, BASE_EVAL_QUESTIONS, settings.data.split_seed, TEST_LIMIT)
    if settings.head == "span" and not finds_spans(read_config(model.name, model.revision), model):
        lengths = replace(lengths, max_length=None)  # --max-length is for windows then
    evaluation = QuestionEvaluation(
        model=model,
        questions=lengths,
        prompt=settings.prompt,
        tokens_per_device=settings.optimisation.tokens_per_device,
        seed=settings.optimisation.seed,
        data_sha256=reporting_sha256(splits.record),
    )

    def evaluate_into_base(folder: Path) -> dict:
        return evaluate(folder, evaluation, questions, run.accelerator, stop_signal, overwrite=True)

    evaluate_before_training(run, f"{len(questions):,} test questions", evaluate_into_base, score_line)


def evaluate_final(run: RunFolder, settings: TrainSettings, final: Path, splits: Splits, stop_signal) -> None:
    """Evaluate the reloaded final/ on all test questions into eval/final, with the settings in its task.json."""
    evaluation = QuestionEvaluation(
        model=tuned_model(str(final), settings.model),
        questions=QuestionSettings(),
        prompt=PromptSettings(),
        tokens_per_device=settings.optimisation.tokens_per_device,
        data_sha256=reporting_sha256(splits.record),
    )
    folder = run.path / "eval" / "final"
    evaluate(folder, evaluation, splits.test, run.accelerator, stop_signal, overwrite=True)
