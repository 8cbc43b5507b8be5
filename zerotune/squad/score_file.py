"""eval/qa.py --score: an official-format prediction file is scored without a model, and without importing torch."""

import hashlib
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json, write_json
from zerotune.run.folder import check_earlier_run, recorded_flags
from zerotune.run.process import describe_process, say
from zerotune.settings.resolve import data_settings
from zerotune.squad.files import read_predictions, require_predictions
from zerotune.squad.metrics import PredictedAnswers
from zerotune.squad.questions import TASK
from zerotune.squad.report import print_scores
from zerotune.squad.result_files import write_question_results
from zerotune.squad.splits import load_test
from zerotune.tasks.sources import reporting_sha256

OF_A_MODEL = (
    "model", "revision", "load_4bit", "shots", "n_best", "max_length", "max_answer_length", "max_new_tokens",
    "doc_stride", "tokens_per_device",
)  # fmt: skip


def score_predictions(args) -> None:
    """Score --score's file on the questions that the data flags name, and write an evaluation into --output-dir.

    Raises Refused for malformed files and for questions without a prediction or without gold answers."""
    given = [f"--{name.replace('_', '-')}" for name in OF_A_MODEL if getattr(args, name)]
    if given:
        raise Refused(f"--score scores {args.score} without a model and has no use for {', '.join(given)}: drop them")
    predictions = read_predictions(args.score)
    args.output_dir = args.output_dir or Path("runs") / f"score-{args.score.name.partition('.')[0]}"
    check_earlier_run(args.output_dir, args, says_finished=False)
    sha256 = hashlib.sha256(args.score.read_bytes()).hexdigest()
    questions, record = load_test(data_settings(args), None)
    identity = {"predictions_sha256": sha256, "data_sha256": reporting_sha256(record)}
    earlier = args.output_dir / "metrics.json"
    if earlier.exists() and not identity.items() <= read_json(earlier).items():
        raise Refused(f"{args.output_dir} holds the scores of other predictions or data: choose another --output-dir")
    if questions[0].answers is None:
        raise Refused("--score needs gold answers, and the questions have none: name a file that has them")
    num_unknown = require_predictions(predictions, questions, str(args.score))
    if num_unknown:
        say(f"{num_unknown:,} predictions are of no question here and do not count")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--output-dir {args.output_dir} cannot be written ({error.strerror}): name another") from None
    write_json(args.output_dir / "split.json", record)
    write_json(args.output_dir / "run.json", {**describe_process(), "flags": recorded_flags(args)})
    predicted = PredictedAnswers([predictions[each.id] for each in questions])
    found = write_question_results(args.output_dir, questions, predicted, args.seed)
    described = {
        "task": TASK,
        "setting": "prediction file",
        "model": args.score.name,
        "seed": None,
        **identity,
    }
    write_json(args.output_dir / "metrics.json", described | found)
    write_json(args.output_dir / "state.json", {"state": "finished", "reason": None})
    print_scores(found)
    say(f"results in {args.output_dir}")
