"""Score answers to SQuAD v2's questions as the official scorer does.

    python eval/qa.py --score predictions.json --test-file dev-v2.0.json

scores a prediction file in the official form, {question id: answer}, without a model.
"""

from zerotune.runs import run_script
from zerotune.squad_arguments import qa_eval_parser


def main(args):
    if args.score is not None:
        from zerotune.squad_scoring import score_predictions

        score_predictions(args)
        return
    from zerotune import question_answering

    question_answering.evaluate(args)


if __name__ == "__main__":
    run_script(main, qa_eval_parser(__doc__).parse_args())
