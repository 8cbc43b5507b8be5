"""A stand-in for a train script and its launcher: it quickly writes what summaries read, or ends in a given way.

    python tests/fake_run.py train/sst2.py --learning-rate 1e-3 --seed 1 --output-dir FOLDER --state-file FILE

The parent folder's .fates.json says how each folder ends: "refused", "early" (refused before it has a folder), "crash",
"early crash", "stop" (preempted by itself) or "wait" (until a signal). calls.txt there lists the name of each folder
that was started.
"""

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from zerotune.settings.groups import DataSettings


def write_run(folder, validation, test, choose_by="accuracy", rows="a", source="b", loss=None, data="c") -> None:
    """Write the records of a finished run with these accuracies and this validation loss, by default 1 - accuracy.

    Args:
        rows, source: identify its validation rows, and the file that they come from.
        data: identifies its training file.
    """
    part = {"count": 100, "ids_sha256": rows}
    test_metrics = {"task": "sst2", "setting": "head", "count": 100, "accuracy": test, "accuracy_ci95": [0.0, 1.0]}
    metrics = [{"step": 1, "loss": 0.7, "learning_rate": 0.1}, {"step": 1, "eval_loss": 0.1, "eval_accuracy": 0.0}]
    metrics.append({"step": 2, "eval_loss": 1 - validation if loss is None else loss, "eval_accuracy": validation})
    records = {
        "run.json": {"flags": {}, "task": "sst2", "identity": {"data": {"train": data}}},
        "final/task.json": {"best_step": 2, "choose_by": choose_by},
        "split.json": {
            "splits": {"validation": part},
            "sources": {"train": {"sha256": source}},
            "settings": asdict(DataSettings()),
        },
        "eval/final/metrics.json": test_metrics,
        "state.json": {"state": "finished", "reason": None},
    }
    for name, record in records.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))


def _end(folder: Path, state: str, status: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"state": state, "reason": "so it was told"}))
    sys.exit(status)


def main(flags: dict[str, str]) -> None:
    folder = Path(flags["--output-dir"])
    fates = folder.parent / ".fates.json"
    fate = json.loads(fates.read_text()).get(folder.name) if fates.exists() else None
    with (folder.parent / "calls.txt").open("a") as calls:
        calls.write(f"{folder.name}\n")
    if fate == "early":
        Path(flags["--state-file"]).write_text('{"state": "refused", "reason": "bad input"}')
        sys.exit(2)
    if fate == "early crash":
        sys.exit(1)
    if fate == "refused":
        _end(folder, "refused", 2)
    if fate == "crash":
        _end(folder, "running", 1)
    if fate == "stop":
        _end(folder, "preempted", 75)
    if fate == "wait":
        for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
            signal.signal(number, lambda *_, status=status: _end(folder, "preempted", status))
        (folder.parent / "ready").touch()
        time.sleep(60)
    seed, rate = int(flags.get("--seed", 0)), float(flags.get("--learning-rate", 0))
    write_run(folder, validation=0.5 + rate + seed / 100, test=0.4 + rate + seed / 100)


if __name__ == "__main__":
    words = [word for word in sys.argv[2:] if word != "--plan"]
    main(dict(zip(words[::2], words[1::2], strict=True)))
