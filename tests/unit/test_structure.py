"""Test the layout's rules: imports run one way, names shadow nothing, and named paths and links exist."""

import ast
import functools
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT_FOLDERS = ("train", "eval")
LIBRARY = sorted((REPOSITORY / "zerotune").rglob("*.py"))
SCRIPTS = sorted(path for folder in SCRIPT_FOLDERS for path in (REPOSITORY / folder).glob("*.py"))
BENCHMARKS = sorted((REPOSITORY / "tests" / "benchmarks").glob("*.py"))
ROOMS = (  # from the lowest upwards
    "errors", "randomness", "records", "files", "terminal", "settings", "run", "metrics", "models", "tasks", "training",
    "evaluation", "report", "squad", "prediction", "sweep", "cluster",
)  # fmt: skip
# Files that a run, an evaluation or a user writes, and names in trackers: named in documents, never shipped.
MADE_LATER = (
    "runs/", "checkpoints/", "final/", "eval/base", "eval/final", ".venv/", "slurm/site.env", "slurm/hook.sh",
    "train/loss", "train/mean_loss", "train/learning_rate",
)  # fmt: skip
NAMED_PATH = re.compile(
    r"(?<![\w./~$-])((?:train|eval|zerotune|ds_configs|presets|slurm|tests|docs|\.ci)/[\w./-]*\w|\w[\w-]*\.(?:cfg|toml|cff))(?![\w/])"
)


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module


def top_names(path):
    return {name.partition(".")[0] for name in imported_modules(path)}


def test_there_is_something_to_check():
    assert len(LIBRARY) > 20 and {path.name for path in SCRIPTS} >= {"sst2.py", "compare.py"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_library_imports_no_script(path):
    assert not top_names(path) & {*SCRIPT_FOLDERS, "tests", "slurm"}
    scripts_alone = {script.stem for script in SCRIPTS} - {module.stem for module in LIBRARY}
    assert not top_names(path) & scripts_alone


def test_imports_between_the_rooms_of_the_library_run_one_way():
    """A room is a folder of zerotune/ or a module next to the folders. ROOMS lists them from the lowest upwards."""
    rooms = {}
    for path in LIBRARY:
        room = path.relative_to(REPOSITORY / "zerotune").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "zerotune":
                rooms.setdefault(room, set()).update(one.name for one in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("zerotune."):
                rooms.setdefault(room, set()).add(node.module.split(".")[1])
    list(TopologicalSorter({room: used - {room} for room, used in rooms.items()}).static_order())
    upwards = {room: used & set(ROOMS[ROOMS.index(room) + 1 :]) for room, used in rooms.items() if room in ROOMS}
    assert not any(upwards.values()), upwards


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_imports_no_script(path):
    """train/ is first on the path of its scripts, so `import sst2` would find train/sst2.py."""
    assert not top_names(path) & {*SCRIPT_FOLDERS, *(script.stem for script in SCRIPTS)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_shadows_no_library(path):
    assert path.stem not in sys.stdlib_module_names
    elsewhere = [folder for folder in sys.path if folder not in ("", str(path.parent))]
    assert PathFinder.find_spec(path.stem, elsewhere) is None, f"{path} hides an installed module"


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_script_folders_are_no_packages(folder):
    assert not (REPOSITORY / folder / "__init__.py").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_opens_with_a_launch_line_and_has_a_main(path):
    tree = ast.parse(path.read_text())
    own_name = f"{path.parent.name}/{path.name}"
    launch_lines = re.findall(rf"(?:python|accelerate launch) .*{own_name}", ast.get_docstring(tree))
    assert launch_lines
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


OPEN_EACH = """
import runpy, sys
own = list(sys.path)
for path in sys.argv[1:]:
    sys.argv, sys.path[:] = [path, "--help"], [path.rpartition("/")[0], *own]
    helpers = path.rpartition("benchmarks/")[0]
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(helpers):
            del sys.modules[name]  # what another script's folders offered
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, path
"""


def test_the_benchmarks_start_outside_pytest():
    """pytest's pythonpath finds helpers that `python tests/benchmarks/NAME.py` would not."""
    started = [path for path in BENCHMARKS if f"    python tests/benchmarks/{path.name}" in path.read_text()]
    assert len(started) >= 14
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", OPEN_EACH, *map(str, started)], cwd=REPOSITORY, env=environment, check=True)


def heavy_at_import(path):
    """Return the libraries that a module imports at its top and that take a second to import."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names & {"torch", "transformers", "datasets", "sklearn", "matplotlib", "peft", "accelerate", "deepspeed"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_imports_nothing_heavy_before_its_arguments_are_read(path):
    assert not heavy_at_import(path)


def named_paths(text):
    """Return the repository's paths that a document names, without those that are made later."""
    found = {match[1].rstrip(".") for match in NAMED_PATH.finditer(text)}
    return {path for path in found if not path.startswith(MADE_LATER) and not re.search("NAME|FOLDER|MODULE", path)}


def pages():
    return [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]


def documents():
    for path in (*pages(), *(REPOSITORY / "slurm").glob("*.*"), REPOSITORY / ".ci/run"):
        yield path.name, path.read_text()
    for path in [*LIBRARY, *SCRIPTS]:
        tree = ast.parse(path.read_text())
        nodes = [
            node
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        yield (
            str(path.relative_to(REPOSITORY)),
            "\n".join(ast.get_docstring(node) or "" for node in nodes),
        )


def messages():
    """Return the library's strings, because a refusal's way out names files too."""
    for path in [*LIBRARY, *SCRIPTS]:
        strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        yield str(path.relative_to(REPOSITORY)), "\n".join(one for one in strings if isinstance(one, str))


def test_the_search_for_paths_finds_them():
    text = "see train/sst2.py, ds_configs/zero2.json. In runs/a/final and `eval/final`: setup.cfg; no/train/x.py, a/b"
    assert named_paths(text) == {"train/sst2.py", "ds_configs/zero2.json", "setup.cfg"}
    assert any(named_paths(text) for _, text in documents())


@pytest.mark.parametrize("kind", [documents, messages])
def test_every_path_that_is_named_exists(kind):
    absent = {
        name: missing
        for name, text in kind()
        if (missing := {path for path in named_paths(text) if not (REPOSITORY / path).exists()})
    }
    assert not absent


def test_every_module_that_is_named_exists():
    """Check dotted names in documents, job scripts, comments and strings."""
    tests = [path for path in (REPOSITORY / "tests").rglob("*.py")]
    texts = dict(documents()) | {str(path.relative_to(REPOSITORY)): path.read_text() for path in [*LIBRARY, *tests]}
    absent, num_checked = [], 0
    for name, text in texts.items():
        for first, second in re.findall(r"\bzerotune\.([a-z]\w*)(?:\.([a-z]\w*))?", text):
            room = REPOSITORY / "zerotune" / first
            found = (room / f"{second}.py").exists() if room.is_dir() and second else room.exists()
            num_checked += 1
            if not (found or room.with_suffix(".py").exists()):
                absent.append(f"{name}: zerotune.{first}.{second}")
    assert num_checked > 500 and not absent


def headings(page):
    """Return the names that GitHub gives a page's headings in links."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_of_the_documents_leads_somewhere():
    num_checked = 0
    for path in pages():
        for target, place in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            page = path.parent / target if target else path
            assert page.exists(), f"{path.name} links to {target}"
            assert not place or place in headings(page), f"{path.name} links to {target}#{place}"
            num_checked += 1
    assert num_checked > 20


@functools.cache
def defined_names(module):
    """Return the names that a library module defines at its top, without imports; for a room, its modules."""
    path = REPOSITORY / module.replace(".", "/")
    if path.is_dir():
        return {one.stem for one in path.glob("*.py")}
    names = set()
    for node in ast.parse(path.with_suffix(".py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
    return names


def test_names_are_imported_from_where_they_are_defined():
    """This also holds in scripts that no test runs, such as benchmarks and recordings."""
    wrong, num_checked = [], 0
    for path in [
        path for folder in ("zerotune", "train", "eval", "tests") for path in (REPOSITORY / folder).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("zerotune."):
                defined = defined_names(node.module)
                wrong += [f"{path.name}: {node.module}.{one.name}" for one in node.names if one.name not in defined]
                num_checked += len(node.names)
    assert num_checked > 100 and not wrong
