"""Try every way to resume with another number of processes, against a one-process run that was never stopped.

    python tests/benchmarks/world_sizes.py

Runs train/sst2.py as tests/scripts does, for 8 steps on a tiny Llama on the CPU: two steps on four processes, the next
two on two, and so on. Prints the largest differences from the undisturbed run: relative for losses and gradient norms,
absolute for weights. The bounds and their reasons are in tests/scripts/comparing.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarking import REPOSITORY, conditions, markdown_table, write_record

sys.path.append(str(REPOSITORY / "tests" / "scripts"))

WORLDS = ((2, 1), (1, 2), (4, 2, 4), (4, 1, 2))
METHODS = {
    "full": (None, "zero1", "zero2", "zero3", "zero3_offload"),
    "lora": (None, "zero1", "zero2", "zero3", "zero3_offload"),
    "qlora": (None, "qlora"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args()


def main(args) -> None:
    from comparing import differences, weight_difference
    from conftest import open_workplace
    from moving import deepspeed, move

    rows = []
    with tempfile.TemporaryDirectory() as folder, open_workplace(Path(folder)) as workplace:
        for method, configs in METHODS.items():
            flags = ["--method", method]
            reference = workplace.train(f"{method}-undisturbed", *flags)
            for config in configs:
                for worlds in WORLDS:
                    path = " → ".join(map(str, worlds))
                    run = move(workplace, f"{method}-{config}-{path}", [*flags, *deepspeed(config)], worlds)
                    found = {**differences(run, reference), "weights": weight_difference(run, reference)}
                    rows.append({"method": method, "DeepSpeed": config or "none", "processes": path, **found})
                    print(rows[-1], flush=True)
    columns = {name: lambda row, name=name: row[name] for name in ("method", "DeepSpeed", "processes")}
    columns |= {name: lambda row, name=name: f"{row[name]:.1e}" for name in ("loss", "grad_norm", "weights")}
    print(markdown_table(rows, columns))
    write_record(args.output, {"conditions": conditions(1), "rows": rows})


if __name__ == "__main__":
    main(parse_args())
