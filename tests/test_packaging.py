"""The layout of the package: what an installation holds, what may import what, and how long the first pages are."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tokenize
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted([*ROOT.glob("nanokv/**/*.py"), *ROOT.glob("trace/**/*.py")])

WAYS = {
    "uninstalled": None,
    "wheel": ["{wheel}"],
    "editable": ["--editable", "."],
    "editable-compat": ["--editable", ".", "--config-settings", "editable_mode=compat"],
    "editable-strict": ["--editable", ".", "--config-settings", "editable_mode=strict"],
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# Nothing is fetched: the build finds setuptools, and nanokv its dependencies, in the environment that runs the tests.
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation"]

STANDARD_TRACE = """
import os, sysconfig, trace
assert trace.Trace and trace.CoverageResults
assert os.path.samefile(trace.__file__, os.path.join(sysconfig.get_path("stdlib"), "trace.py")), trace.__file__
"""
NANOKV_TRACE = """
import sys, warnings
warnings.simplefilter("error", ImportWarning)
import nanokv.trace
from nanokv.trace import Flow, Recorder, Trace
import nanokv.trace.schema
assert Recorder is nanokv.trace.recorder.Recorder and Recorder.__module__ == "nanokv.trace.recorder"
assert nanokv.trace.__package__ == nanokv.trace.__spec__.parent == "nanokv.trace"
print(nanokv.trace.schema.__file__)
"""


@dataclass(frozen=True)
class Installation:
    """One way to have nanokv: a copy of the repository, and an environment into which it was installed, or was not."""

    way: str
    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def environment(self) -> Path:
        return self.folder / "environment"

    def run(self, *command: str | Path, where: str) -> str:
        """The output of a command of the environment, run from the repository's `root` or from `elsewhere`."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        if self.way == "uninstalled" and where == "elsewhere":
            variables["PYTHONPATH"] = str(self.repository)
        cwd = self.repository if where == "root" else self.folder
        return run([str(self.environment / "bin" / command[0]), *map(str, command[1:])], cwd, variables)


def run(command: list[str], cwd: Path, variables: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_repository(destination: Path) -> None:
    destination.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, destination)
    for name in ("nanokv", "trace"):
        shutil.copytree(ROOT / name, destination / name, ignore=shutil.ignore_patterns("__pycache__"))


def make_environment(folder: Path) -> None:
    """A virtual environment with every package of this one except nanokv, as links."""
    venv.create(folder, with_pip=False, symlinks=True)
    (there,) = folder.glob("lib/python*/site-packages")
    for here in sys.path:
        if Path(here).name not in ("site-packages", "dist-packages") or not Path(here).is_dir():
            continue
        for entry in Path(here).iterdir():
            if "nanokv" not in entry.name and not (there / entry.name).exists():
                (there / entry.name).symlink_to(entry)


def require_build_tools() -> None:
    try:
        setuptools = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        setuptools = "0.0"
    if tuple(map(int, setuptools.split(".")[:2])) < (70, 1) or importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip, and the setuptools that pip install -e '.[test]' brings")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_build_tools()
    folder = tmp_path_factory.mktemp("wheel")
    copy_repository(folder / "repository")
    run([*PIP, "wheel", *OFFLINE, "--wheel-dir", str(folder), "./repository"], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=WAYS)
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    made = Installation(request.param, tmp_path_factory.mktemp(request.param))
    copy_repository(made.repository)
    make_environment(made.environment)
    if arguments := WAYS[made.way]:
        built = request.getfixturevalue("wheel")
        into = [*PIP, "--python", str(made.environment / "bin/python"), "install", *OFFLINE]
        run([*into, *(argument.format(wheel=built) for argument in arguments)], made.repository)
    return made


def test_the_folder_trace_has_no_init_file() -> None:
    assert (ROOT / "trace").is_dir()
    assert not list((ROOT / "trace").glob("__init__*"))


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_import_trace_is_the_standard_module(installation: Installation, where: str) -> None:
    installation.run("python", "-c", STANDARD_TRACE, where=where)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_nanokv_trace_can_be_imported(installation: Installation, where: str) -> None:
    found = installation.run("python", "-c", NANOKV_TRACE, where=where).strip()
    if installation.way == "wheel" and where == "elsewhere":
        assert Path(found).is_relative_to(installation.environment)
    else:
        assert os.path.samefile(found, installation.repository / "trace/schema.py")


def test_the_command_is_installed(installation: Installation) -> None:
    if installation.way == "uninstalled":
        assert "usage" in installation.run("python", "-m", "nanokv.cli", "--help", where="root")
    else:
        assert "usage" in installation.run("nanokv", "--help", where="elsewhere")


@pytest.mark.parametrize("runner", ["pytest", "python -m pytest"])
def test_both_traces_can_be_imported_under_pytest(tmp_path: Path, runner: str) -> None:
    here = Installation("uninstalled", tmp_path)
    copy_repository(here.repository)
    make_environment(here.environment)
    (here.repository / "tests").mkdir()
    test = f"def test_it():\n    exec({STANDARD_TRACE + NANOKV_TRACE!r}, {{}})\n"
    (here.repository / "tests/test_it.py").write_text(test)
    # The command pytest differs from python -m pytest in that sys.path starts with its own folder, not with the root.
    (tmp_path / "pytest_command.py").write_text("import sys, pytest\nsys.exit(pytest.main())\n")
    command = [tmp_path / "pytest_command.py"] if runner == "pytest" else ["-m", "pytest"]
    assert "1 passed" in here.run("python", *command, where="root")


def test_the_wheel_holds_every_module_the_licence_and_the_marker_of_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    sources = [str(path.relative_to(ROOT)) for path in MODULES]
    expected = {source if source.startswith("nanokv/") else f"nanokv/{source}" for source in sources}
    assert {name for name in names if ".dist-info/" not in name} == {*expected, "nanokv/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)
    assert "nanokv = nanokv.cli:main" in entry_points


def nodes(tree: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    """All nodes below one; what stands under `if TYPE_CHECKING` only if asked for, as it never runs."""
    for node in ast.iter_child_nodes(tree):
        if for_types or not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield node
            yield from nodes(node, for_types)


def imports(path: Path, for_types: bool) -> Iterator[str]:
    """The full name of everything that a module imports anywhere in it; `from a import b` gives both a and a.b."""
    package = ["nanokv", "trace"] if path.parent.name == "trace" else ["nanokv"]
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), for_types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def importers(name: str, for_types: bool = False) -> set[str]:
    """The modules of nanokv/ and trace/ that import the package `name` or something in it."""
    return {
        f"{path.parent.name}/{path.name}"
        for path in MODULES
        if any(f"{imported}.".startswith(f"{name}.") for imported in imports(path, for_types))
    }


def test_in_nanokv_only_the_command_the_shim_and_what_a_notebook_shows_of_a_cache_import_the_trace() -> None:
    within = {path for path in importers("nanokv.trace", for_types=True) if path.startswith("nanokv/")}
    assert within <= {"nanokv/cli.py", "nanokv/trace.py", "nanokv/cache.py"}


def test_graphviz_is_imported_in_draw_alone() -> None:
    assert importers("graphviz") == {"trace/draw.py"}


def test_numba_is_imported_in_the_engine_room_alone() -> None:
    assert importers("numba") | importers("llvmlite") == {"nanokv/kernels.py", "nanokv/microkernel.py"}


def test_importing_nanokv_loads_nothing_heavy() -> None:
    heavy = {
        "gguf", "graphviz", "huggingface_hub", "jinja2", "llvmlite", "matplotlib", "nanokv.trace", "networkx", "numba",
        "pyarrow", "tokenizers", "torch", "transformers", "typst",
    }  # fmt: skip
    loaded = run([sys.executable, "-c", "import sys, nanokv; print(*sys.modules)"], ROOT).split()
    assert "nanokv" in loaded
    assert not heavy.intersection(loaded)


def lines_of_code(path: Path) -> int:
    """The lines that are not blank, comment or docstring."""
    text = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)


def test_lines_of_code_are_counted_without_blanks_comments_and_docstrings(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    no_code = '"""One,\n\ntwo."""\n\n# three\n'
    code = ['x = """a', 'b"""  # a string, but not a docstring', "def f():", "    return (", "        x", "    )"]
    module.write_text(no_code + "\n".join([*code[:3], '    """Four."""', "", *code[3:]]))
    assert lines_of_code(module) == len(code)


def test_the_pages_read_first_stay_under_700_lines_of_code() -> None:
    pages = ("config.py", "cache.py", "ops.py", "transformer.py")
    lengths = {name: lines_of_code(ROOT / "nanokv" / name) for name in pages}
    assert sum(lengths.values()) < 700, lengths
