"""Presets: the flags of a known experiment, in presets/NAME.txt or in a file of the user's own."""

from pathlib import Path

from zerotune.errors import Refused, listed, nearest
from zerotune.settings.flag_files import FlagLine, read_flag_file
from zerotune.settings.flag_parser import FlagParser

FOLDER = Path(__file__).resolve().parents[2] / "presets"
# Flags of a single launch, not of an experiment.
NOT_OF_AN_EXPERIMENT = (
    "--help",
    "-h",
    "--preset",
    "--seeds",
    "--sweep",
    "--launcher",
    "--plan",
    "--resume",
    "--state-file",
)


def preset_lines(name: str, parser: FlagParser, script: str) -> list[FlagLine]:
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
        if line.flag in NOT_OF_AN_EXPERIMENT:
            raise Refused(f"{line.where}: {line.flag} is for the command line, not for a preset; take it out")
        try:
            FlagParser.read(parser, line.words)
        except Refused as refusal:
            raise Refused(f"{line.where}: {refusal}") from None
    if not lines:
        raise Refused(f"{path} holds no flag; wanted lines of a flag and its values, such as --epochs 3")
    return lines


def _preset_file(name: str, script: str) -> Path:
    shipped = {path.stem: path for path in sorted(FOLDER.glob("*.txt"))}
    if name in shipped:
        other = _script_of(shipped[name])
        if other != script:
            raise Refused(f"the preset {name} is of {other}, and this is {script}: {_presets_of(script, shipped)}")
        return shipped[name]
    if "/" in name or name.endswith(".txt") or Path(name).is_file():
        return Path(name)
    meant = nearest(name, shipped)
    hint = f"did you mean {meant}? " if meant and _script_of(shipped[meant]) == script else ""
    raise Refused(f"no preset {name!r}: {hint}{_presets_of(script, shipped)}")


def _presets_of(script: str, shipped: dict[str, Path]) -> str:
    names = [name for name, path in shipped.items() if _script_of(path) == script]
    own = "a file of your own is given by its path, as ./my.txt"
    return f"{script} has {listed(names)}; {own}" if names else f"{script} has none; {own}"


def _script_of(path: Path) -> str | None:
    """Return the script that a shipped preset names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.strip() for line in lines if line.strip().startswith("train/")), None)
