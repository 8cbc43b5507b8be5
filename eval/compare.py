"""python eval/compare.py runs/a/eval/final runs/b/eval/final --output-dir runs/compare

Compares evaluation folders of one task: scores with intervals, a paired test of each against the first on the items
that both scored, and mean ± standard deviation where folders differ only in the training seed. Several seeds of one
command:

    for seed in 0 1 2; do accelerate launch train/sst2.py --seed $seed --output-dir runs/seed-$seed; done
    python eval/compare.py runs/seed-*/eval/final --output-dir runs/seeds
"""

import argparse
from pathlib import Path

from zerotune.run.process import run_script
from zerotune.settings.flags import new_parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "evaluations",
        nargs="+",
        type=Path,
        metavar="EVAL_DIR",
        help="folder with predictions.jsonl and metrics.json; the first one is what the others are tested against",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="folder for report.html and comparison.json"
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    from zerotune.report.comparison import write_comparison

    print(f"comparison: {write_comparison(args.evaluations, args.output_dir)}")


if __name__ == "__main__":
    run_script(main, parse_arguments())
