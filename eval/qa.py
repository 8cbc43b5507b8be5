"""Evaluate a model on SQuAD v2 with the official scores: by its span head, or by the answers that it writes.

    python eval/qa.py --model runs/squad-distilbert-base-uncased-full/final
    python eval/qa.py --model meta-llama/Llama-3.2-1B --shots 4
    accelerate launch --num_processes 8 eval/qa.py --model runs/squad-llama-3.2-1b-lora-generate/final
    python eval/qa.py --model runs/squad-distilbert-base-uncased-full/final --test-file questions.json
    python eval/qa.py --score predictions.json --test-file dev-v2.0.json

The last line scores a prediction file in the official form, {question id: answer}, without a model.
"""

from zerotune.run.process import run_script
from zerotune.squad.settings import qa_eval_parser


def main(args):
    if args.score is not None:
        from zerotune.squad.score_file import score_predictions

        score_predictions(args)
        return
    from zerotune import question_answering

    question_answering.evaluate(args)


if __name__ == "__main__":
    run_script(main, qa_eval_parser(__doc__).parse_args())
