"""Evaluate a model on SQuAD v2 with the official scores: by its span head, or by the answers that it writes.

    python eval/qa.py --model runs/squad-distilbert-base-uncased-full/final
    python eval/qa.py --model meta-llama/Llama-3.2-1B --shots 4
    accelerate launch --num_processes 8 eval/qa.py --model runs/squad-llama-3.2-1b-lora-generate/final
    python eval/qa.py --model runs/squad-distilbert-base-uncased-full/final --test-file questions.json
    python eval/qa.py --score predictions.json --test-file dev-v2.0.json

The last line scores a prediction file in the official format, {question id: answer}, without a model.
"""

from pathlib import Path

from zerotune.run.process import run_script, say
from zerotune.settings.groups import RunSettings
from zerotune.settings.names import is_sample_model
from zerotune.settings.resolve import data_settings, eval_settings, record_flags
from zerotune.squad.questions import TASK
from zerotune.squad.settings import qa_eval_parser


def main(args) -> None:
    if args.score is not None:
        from zerotune.squad.score_file import score_predictions

        folder = args.output_dir or Path("runs") / f"score-{args.score.name.partition('.')[0]}"
        run_settings = RunSettings(folder, record_flags(args, {"output_dir": folder}))
        score_predictions(args.score, data_settings(args), run_settings, args.seed)
        return

    from zerotune.evaluation.plan import plan_evaluation
    from zerotune.models.pretrained import read_model
    from zerotune.report.evaluation_report import write_evaluation_report
    from zerotune.run.folder import RunFolder, check_earlier_run
    from zerotune.run.launch import start_accelerator, use_own_device
    from zerotune.run.stopping import StopSignal
    from zerotune.squad.evaluation import QuestionEvaluation, check_evaluation, describe_batches, evaluate
    from zerotune.squad.prompts import draw_solved_questions
    from zerotune.squad.report import print_scores, question_parts
    from zerotune.squad.sample import make_sample_model
    from zerotune.squad.splits import load_shots, load_test
    from zerotune.tasks.split_file import reporting_sha256, split_of_run

    stop_signal = StopSignal()
    settings = eval_settings(args, TASK)
    use_own_device(tiny_model=is_sample_model(settings.model.name))
    make_sample_model(settings.model.name)

    # Read the model's configuration, the questions and the shots, and refuse what cannot work: nothing is loaded yet.
    def read() -> tuple:
        config, tokenizer = read_model(settings.model, TASK, needs_weights=not settings.run.plan)
        run_split = split_of_run(settings.model.name, TASK)
        questions, record = load_test(settings.data, run_split)
        shots, num_shots = (), settings.prompt.shots
        if num_shots:
            shots = draw_solved_questions(load_shots(settings.data, run_split, questions), num_shots, settings.seed)
        evaluation = QuestionEvaluation(
            model=settings.model,
            questions=settings.questions,
            prompt=settings.prompt,
            tokens_per_device=settings.tokens_per_device,
            seed=settings.seed,
            shots=shots,
            data_sha256=reporting_sha256(record),
        )
        check_evaluation(settings.run.output_dir, evaluation, questions, config, tokenizer)
        return evaluation, questions, config, record

    if settings.run.plan:
        say(plan_evaluation(settings, lambda: describe_batches(*read()[:-1])))
        return
    check_earlier_run(settings.run, says_finished=False)
    evaluation, questions, _, record = read()

    accelerator = start_accelerator(None)
    with RunFolder(settings.run, accelerator) as run:
        run.describe(record)
        metrics = evaluate(run.path, evaluation, questions, accelerator, stop_signal)
        print_scores(metrics)
        say(f"results in {run.path}")
        write_evaluation_report(run.path, question_parts({question.id: question for question in questions}))
        run.write_json("state.json", {"state": "finished", "reason": None})


if __name__ == "__main__":
    run_script(main, qa_eval_parser(__doc__).parse_args())
