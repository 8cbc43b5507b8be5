"""A parser that refuses wrong flags in one line, and records which flags were typed."""

import argparse
import os
import re
import sys
from collections.abc import Sequence

from zerotune.errors import EXIT_REFUSED, Refused, nearest
from zerotune.terminal import make_output_tolerant

# argparse's wording, and zerotune's.
PLAIN_WORDS = {
    r"expected one argument": "needs a value",
    r"expected at least one argument": "needs at least one value",
    r"ignored explicit argument (.*)": r"takes no value, but was given \1",
}


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors are one line with the rule, the value found and the way out.

    Args:
        description: the script's docstring, which the help begins with.
    """

    def __init__(self, description: str | None = None, **more):
        formatter = argparse.RawDescriptionHelpFormatter  # does not wrap the description again
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **more)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """Return the flags like `read`; if it refuses them, print one line and end the process."""
        make_output_tolerant()  # --help prints now
        try:
            return self.read(sys.argv[1:] if args is None else args)
        except Refused as error:
            if os.environ.get("RANK", "0") == "0":  # all ranks have the same flags
                print(f"refused: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_REFUSED)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the flags, with the names of those that were typed in `typed`.

        Raises:
            Refused: a flag is unknown or has a wrong value.
        """
        before_rest = arguments[: arguments.index("--")] if "--" in arguments else arguments
        self._refuse_unknown([word for word in before_rest if re.fullmatch(r"--\w[\w-]*(=\S*)?", word)])
        parsed, unknown = self.parse_known_args(arguments)
        self._refuse_unknown([word for word in unknown if word.startswith("-")])
        if unknown:
            raise Refused(f"{unknown[0]!r} belongs to no flag; --help lists the flags")
        untouched = []  # a list, which argparse can add a repeated flag's values to
        again = self.parse_known_args(arguments, argparse.Namespace(**dict.fromkeys(vars(parsed), untouched)))[0]
        parsed.typed = frozenset(name for name, value in vars(again).items() if value is not untouched)
        return parsed

    def error(self, message: str):
        """Raise argparse's error as Refused."""
        named = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
        if named:
            flag, problem = named.groups()
            for pattern, words in PLAIN_WORDS.items():
                problem = re.sub(pattern, words, problem)
            message = f"{flag} {problem}"
        required = message.removeprefix("the following arguments are required: ")
        if required != message:
            message = f"{required} is missing" if "," not in required else f"{required} are missing"
        message = re.sub(r"(\S{60})\S{60,}", r"\1…", message)
        raise Refused(f"{message}; --help lists the flags" if required == message and not named else message)

    def flag_names(self) -> list[str]:
        """Return all flags."""
        return [name for action in self._actions for name in action.option_strings]

    def _refuse_unknown(self, words: list[str]) -> None:
        known = self.flag_names()
        for word in words:
            flag = word.partition("=")[0]
            if flag not in known:
                meant = nearest(flag, known)
                raise Refused(f"unknown flag {flag}" + (f": did you mean {meant}?" if meant else "; --help lists all"))

    def _check_value(self, action: argparse.Action, value) -> None:
        """Refuse a value that is not one of the choices."""
        if action.choices is not None and value not in action.choices:
            meant = nearest(str(value), map(str, action.choices))
            way_out = f": did you mean {meant}?" if meant else ""
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"must be one of {choices}, not {str(value)!r}{way_out}")
