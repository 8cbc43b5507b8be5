"""The parser of the train scripts: it reads presets, and plans the runs that --seeds or --sweep ask for.

A preset is the flags of a known experiment, in presets/NAME.txt or in a file of the user's own.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from zerotune.errors import Refused, listed, nearest
from zerotune.settings.flag_files import FlagLine, flag_name, read_flag_file
from zerotune.settings.flag_parser import FlagParser
from zerotune.settings.sweeps import plan_runs

PRESETS = Path(__file__).resolve().parents[2] / "presets"
# Flags of a single launch, not of an experiment.
OF_A_LAUNCH = {"--help", "-h", "--preset", "--seeds", "--sweep", "--launcher", "--plan", "--resume", "--state-file"}


class TrainParser(FlagParser):
    """A parser that puts a preset's flags before the given ones, which override them."""

    def __init__(self, task_name: str, description: str):
        super().__init__(description)
        self.task_name = task_name
        self.script = f"train/{'qa' if task_name == 'squad' else task_name}.py"

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the flags as FlagParser does, with two more entries.

        `preset_line` shows the preset's flags, "" without one. `runs` are those of --seeds and --sweep, None for a
        single run.

        Raises:
            Refused: a flag, the preset or the sweep is wrong.
        """
        given = list(arguments)
        parsed, line = super().read(given), ""
        if parsed.preset is not None:
            lines = _preset_lines(parsed.preset, self, self.script)
            kept = [each for each in lines if flag_name(each.flag) not in parsed.typed]
            line = f"preset {parsed.preset}: {shlex.join(word for each in kept for word in each.words)}"
            if len(kept) < len(lines):
                line += f" (and as given: {', '.join(each.flag for each in lines if each not in kept)})"
            parsed = super().read([*(word for each in lines for word in each.words), *given])
        parsed.preset_line = line
        parsed.runs = plan_runs(self, given, parsed)
        return parsed

    def takes_no_value(self, flag: str) -> bool:
        """Return whether a flag takes no value, like --plan."""
        return self._option_string_actions[flag].nargs == 0


def _preset_lines(name: str, parser: FlagParser, script: str) -> list[FlagLine]:
    """Return the flags of a preset, checked.

    Args:
        name: of a shipped preset, or the path of a file.
        parser: knows the script's flags; its presets are not read again.
        script: "train/sst2.py".
    Raises:
        Refused: there is no such preset, it belongs to another script, or one of its lines is wrong.
    """
    path = _preset_file(name, script)
    lines = read_flag_file(path, parser, script)
    for line in lines:
        if line.flag in OF_A_LAUNCH:
            raise Refused(f"{line.where}: {line.flag} is for the command line, not for a preset; remove it")
        try:
            FlagParser.read(parser, line.words)
        except Refused as refusal:
            raise Refused(f"{line.where}: {refusal}") from None
    if not lines:
        raise Refused(f"{path} holds no flag; wanted lines of a flag and its values, such as --epochs 3")
    return lines


def _preset_file(name: str, script: str) -> Path:
    shipped = {path.stem: path for path in sorted(PRESETS.glob("*.txt"))}
    if name in shipped:
        other = _script_of(shipped[name])
        if other != script:
            raise Refused(f"the preset {name} is for {other}, and this is {script}: {_presets_of(script, shipped)}")
        return shipped[name]
    if "/" in name or name.endswith(".txt") or Path(name).is_file():
        return Path(name)
    meant = nearest(name, shipped)
    hint = f"did you mean {meant}? " if meant and _script_of(shipped[meant]) == script else ""
    raise Refused(f"no preset {name!r}: {hint}{_presets_of(script, shipped)}")


def _presets_of(script: str, shipped: dict[str, Path]) -> str:
    names = [name for name, path in shipped.items() if _script_of(path) == script]
    own = "give a file of your own by its path, such as ./my.txt"
    return f"{script} has {listed(names)}; {own}" if names else f"{script} has none; {own}"


def _script_of(path: Path) -> str | None:
    """Return the script that a shipped preset names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.strip() for line in lines if line.strip().startswith("train/")), None)
