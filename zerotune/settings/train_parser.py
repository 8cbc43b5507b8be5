"""The parser of the train scripts: it reads presets, and plans the runs that --seeds or --sweep ask for."""

import argparse
import shlex
from collections.abc import Sequence

from zerotune.settings.flag_files import flag_name
from zerotune.settings.flag_parser import FlagParser
from zerotune.settings.presets import preset_lines
from zerotune.settings.sweeps import plan_runs


class TrainParser(FlagParser):
    """A parser that puts a preset's flags before the given ones, which win."""

    def __init__(self, task_name: str, **more):
        super().__init__(**more)
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
            lines = preset_lines(parsed.preset, self, self.script)
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
