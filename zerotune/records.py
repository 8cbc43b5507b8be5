"""Check records that are read back from files: run.json, progress.json, predictions.jsonl and the like.

A form is a TypedDict (of typing_extensions) beside the code that writes the record, or any type that pydantic checks:

    class State(TypedDict):
        state: Literal["running", "preempted", "refused", "finished"]
        reason: NotRequired[str | None]

    state = check_record(json.loads(text), State, path)
"""

from functools import cache
from typing import Annotated

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from zerotune.errors import Refused

Count = Annotated[int, Ge(0), Le(2**63 - 1)]
RESTORE = "restore it, or give the run another folder"


class FileRecord(TypedDict):
    """A manifest's entry for a file."""

    bytes: Count
    sha256: str


def check_record(value, form, where, way_out: str = RESTORE):
    """Return a value that was read from a file, after checking its form.

    Args:
        form: the wanted keys and types. Types are strict (true is not a number, "1" is not an integer); keys that a
            TypedDict does not name are allowed.
        where: the file, and the line if it is a file of lines.
        way_out: what the user can do.
    Raises:
        Refused: the value has another form; the message names the file, the key, and the values found and wanted.
    """
    problem = record_problem(value, form)
    if problem:
        raise Refused(f"{where} is damaged ({problem}): {way_out}")
    return value


def record_problem(value, form) -> str | None:
    """Return a message about the first key that does not match the form; None if all match."""
    from pydantic import ValidationError

    try:
        _checker(form).validate_python(value, strict=True)
    except ValidationError as error:
        return _first_problem(value, error.errors(include_url=False))
    return None


def _first_problem(value, errors: list[dict]) -> str:
    first = errors[0]
    key = _key(value, first["loc"])
    if first["type"] == "missing":
        return f"{'.'.join(map(str, first['loc']))} is missing"
    if first["type"] == "extra_forbidden":
        return f"{key} is not known"
    # if several types are allowed, pydantic reports an error for each
    wanted = [each["msg"].removeprefix("Input should be ") for each in errors if _key(value, each["loc"]) == key]
    found = repr(first["input"])
    found = found if len(found) <= 60 else f"{found[:57]}..."
    return f"{key or 'it'} is {found}, wanted {' or '.join(wanted)}"


def _key(value, location: tuple) -> str:
    """Return the path of keys to a value, without the type names that pydantic puts in it."""
    keys = []
    for part in location:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            keys.append(str(part))
            value = value[part]
    return ".".join(keys)


@cache
def _checker(form):
    from pydantic import TypeAdapter

    return TypeAdapter(form)
