"""Compare evaluations of one task: scores with intervals, and a paired test of each against the first.

    python eval/compare.py runs/a/eval/final runs/b/eval/final --output-dir runs/compare

The paired tests are on the items that both scored. Folders that differ only in the training seed give mean ± standard
deviation too:

    for seed in 0 1 2; do python train/sst2.py --seed $seed --output-dir runs/seed-$seed; done
    python eval/compare.py runs/seed-*/eval/final --output-dir runs/seeds
"""

from pathlib import Path

from zerotune.run.process import run_script
from zerotune.settings.flag_parser import FlagParser
from zerotune.settings.flags import new_parser


def compare_parser() -> FlagParser:
    parser = new_parser(__doc__)
    parser.add_argument(
        "evaluations",
        nargs="+",
        type=Path,
        metavar="EVAL_DIR",
        help="folder with predictions.jsonl and metrics.json; all others are tested against the first one",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="folder for report.html and comparison.json"
    )
    return parser


def main(args) -> None:
    from zerotune.report.comparison import write_comparison

    print(f"comparison: {write_comparison(args.evaluations, args.output_dir)}")


if __name__ == "__main__":
    run_script(main, compare_parser().parse_args())
