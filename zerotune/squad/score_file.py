"""eval/qa.py --score: score a prediction file in the official format, without a model and without importing torch."""

import hashlib
import json
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json, write_json
from zerotune.report.evaluation_report import write_evaluation_report
from zerotune.run.folder import check_earlier_run
from zerotune.run.process import describe_process, say
from zerotune.settings.groups import DataSettings, RunSettings
from zerotune.squad.metrics import PredictedAnswers
from zerotune.squad.questions import TASK, Question
from zerotune.squad.report import print_scores, question_parts, write_question_results
from zerotune.squad.splits import load_test
from zerotune.tasks.files import check_unicode, decode_text, needs_memory, read_bytes
from zerotune.tasks.split_file import reporting_sha256

MODEL_FLAGS = (
    "model", "revision", "load_4bit", "attention", "precision", "shots", "prompt_format", "n_best", "max_length",
    "max_answer_length", "max_new_tokens", "doc_stride", "tokens_per_device", "plan",
)  # fmt: skip


def score_predictions(path: Path, data: DataSettings, run: RunSettings, seed: int) -> None:
    """Score a prediction file on the questions that the data flags name, and write an evaluation into run.output_dir.

    Args:
        seed: of the bootstrap intervals.
    Raises:
        Refused: a file is malformed, a question has no prediction or no gold answers, a flag is about a model, or the
            folder holds something else.
    """
    unused = MODEL_FLAGS if data.split else (*MODEL_FLAGS, "train_file")
    given = [f"--{name.replace('_', '-')}" for name in unused if name in run.flags.typed]
    if given:
        raise Refused(f"--score scores {path} without a model and has no use for {', '.join(given)}: drop them")
    predictions, sha256 = read_predictions(path)
    check_earlier_run(run, says_finished=False)
    questions, record = load_test(data, None)
    identity = {"predictions_sha256": sha256, "data_sha256": reporting_sha256(record)}
    folder = run.output_dir
    earlier = folder / "metrics.json"
    if earlier.exists() and not identity.items() <= read_json(earlier).items():
        raise Refused(f"{folder} holds the scores of other predictions or data: choose another --output-dir")
    if questions[0].answers is None:
        raise Refused("--score needs gold answers, and the questions have none: name a file that has them")
    num_unknown = require_predictions(predictions, questions, str(path))
    if num_unknown:
        say(f"{num_unknown:,} predictions are for no question here and do not count")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--output-dir {folder} cannot be written ({error.strerror}): name another") from None
    write_json(folder / "split.json", record)
    flags = {"flags": dict(run.flags.values), "typed_flags": sorted(run.flags.typed)}
    write_json(folder / "run.json", {**describe_process(), "task": TASK, **flags})
    predicted = PredictedAnswers([predictions[each.id] for each in questions])
    found = write_question_results(folder, questions, predicted, seed)
    described = {"task": TASK, "setting": "prediction file", "model": path.name, "seed": None, **identity}
    write_json(folder / "metrics.json", described | found)
    print_scores(found)
    say(f"results in {folder}")
    write_evaluation_report(folder, question_parts({question.id: question for question in questions}))
    write_json(folder / "state.json", {"state": "finished", "reason": None})


def read_predictions(path: Path) -> tuple[dict[str, str], str]:
    """Read a prediction file in the official format, {question id: answer}, with "" for no answer.

    Returns:
        The answers by id, and the file's sha256; a pipe can be read only once.
    Raises:
        Refused: the file has another format.
    """
    expected = 'wanted one JSON object {"question id": "answer"}'
    with needs_memory(path):
        data = read_bytes(path)
        text = decode_text(data, path)
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not JSON ({error}); {expected}") from None
    if not isinstance(value, list) or not value or not all(isinstance(pair, tuple) for pair in value):
        raise Refused(f"{path}: {'no predictions' if value == [] else 'not a prediction file'}; {expected}")
    predictions: dict[str, str] = {}
    for identifier, text in value:
        if not isinstance(text, str):
            raise Refused(f'{path}: the prediction of {identifier!r} is not a string; {expected}, and "" for no answer')
        check_unicode(identifier, f"{path}, id {identifier!r}")
        check_unicode(text, f"{path}, the prediction of {identifier!r}")
        if identifier in predictions:
            raise Refused(f"{path}: the id {identifier!r} occurs twice; give one prediction per question")
        predictions[identifier] = text
    return predictions, hashlib.sha256(data).hexdigest()


def require_predictions(predictions: dict[str, str], questions: list[Question], name: str) -> int:
    """Return how many predictions are about no question here, which the official scorer skips.

    Raises:
        Refused: a question has no prediction.
    """
    missing = [question.id for question in questions if question.id not in predictions]
    if missing:
        raise Refused(
            f"{name}: no prediction for {len(missing):,} of {len(questions):,} questions, {missing[0]!r} first; give "
            'each one ("" for no answer)'
        )
    return len(predictions) - len(questions)
