"""Compare evaluations of one task: scores with intervals, and a paired test of each against the first.

    python eval/compare.py runs/a runs/b
    python eval/compare.py runs/a/eval/base runs/a/eval/final runs/eval-sst2-gemma-2-2b-it --output-dir runs/compare

A run's folder stands for the evaluation of its final/, a folder of prompt seeds for all of its prompts. The table is
printed; --output-dir keeps it, with curves, as a page. The paired tests are on the items that both scored. Folders that
differ only in the training seed give mean ± standard deviation too:

    python train/sst2.py --seeds 0 1 2 --output-dir runs/seeds
    python eval/compare.py runs/seeds/seed-*
"""

from pathlib import Path

from zerotune.run.process import run_script
from zerotune.settings.flag_parser import FlagParser


def compare_parser() -> FlagParser:
    parser = FlagParser(__doc__)
    parser.add_argument(
        "evaluations",
        nargs="+",
        type=Path,
        metavar="EVAL_DIR",
        help="folder of an evaluation, a run or prompt seeds; all others are tested against the first evaluation",
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="folder for report.html and comparison.json (default: none)"
    )
    return parser


def main(args) -> None:
    from zerotune.report.comparison import comparison_table, read_comparison, write_comparison

    comparison = read_comparison(args.evaluations)
    print(comparison_table(comparison))
    if args.output_dir:
        print(f"comparison: {write_comparison(comparison, args.output_dir)}")


if __name__ == "__main__":
    run_script(main, compare_parser().parse_args())
