"""The four folders at the root and the package they belong to: links, package list, wheel, sdist, archive agree."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("integrations", "kernels", "policies", "storage_backends")
LIBRARY = ("kvtier", *LINKED)
SCRIPTS = ("tests", "benchmarks", "examples")
FILE_LINES = 400
FUNCTION_LINES = 60

BUILD = "import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"


def module_name(path: str | PurePosixPath) -> str:
    """Import name of a file, given its path from the checkout root or from site-packages."""
    parts = PurePosixPath(path).with_suffix("").parts
    parts = parts if parts[0] == "kvtier" else ("kvtier", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def library_files() -> Iterator[Path]:
    """Each module of the library once: the links inside ``kvtier/`` are not followed."""
    for top in LIBRARY:
        for folder, _, names in os.walk(ROOT / top, followlinks=False):
            yield from (Path(folder, name) for name in names if name.endswith(".py"))


def library_modules(paths: Iterable[str]) -> set[str]:
    """Import names of the library's modules among paths from a checkout root."""
    return {module_name(path) for path in paths if path.endswith(".py") and path.split("/")[0] in LIBRARY}


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``git archive`` gives for the working tree, unpacked; neither the repository nor its index is touched."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    scratch = tmp_path_factory.mktemp("archive")
    objects = scratch / "objects"
    objects.mkdir()
    shared = (ROOT / run("git", "rev-parse", "--git-path", "objects")).resolve()
    env = {
        "GIT_INDEX_FILE": str(scratch / "index"),
        "GIT_OBJECT_DIRECTORY": str(objects),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(shared),
    }
    run("git", "add", "--all", **env)
    tree = run("git", "write-tree", **env)
    run("git", "archive", "--format=tar", f"--output={scratch / 'tree.tar'}", tree, **env)
    with tarfile.open(scratch / "tree.tar") as tar:
        tar.extractall(scratch / "tree", filter="data")
    return scratch / "tree"


@pytest.fixture(scope="module")
def sdist(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the archive, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    name = run(sys.executable, "-P", "-c", BUILD.format(hook="build_sdist"), out, cwd=archive).splitlines()[-1]
    with tarfile.open(out / name) as tar:
        tar.extractall(out, filter="data")
    return out / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel that is built from the source distribution, as an installer would build it."""
    out = tmp_path_factory.mktemp("wheel")
    name = run(sys.executable, "-P", "-c", BUILD.format(hook="build_wheel"), out, cwd=sdist).splitlines()[-1]
    with zipfile.ZipFile(out / name) as file:
        return set(file.namelist())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source distribution has no links, only a checkout has")
@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative_and_leads_to_the_folder_at_the_root(name: str) -> None:
    link = ROOT / "kvtier" / name

    assert link.is_symlink(), f"kvtier/{name} must be a link: on Windows, clone with core.symlinks=true"
    assert link.readlink() == Path("..", name)
    assert (link / "__init__.py").is_file()


def test_links_are_tracked(archive: Path) -> None:
    assert {name for name in LINKED if (archive / "kvtier" / name).is_symlink()} == set(LINKED)


def test_package_list_equals_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in library_files()}

    assert listed == sorted(module_name(f"{folder}/__init__.py") for folder in folders)


def test_every_package_has_an_init() -> None:
    assert {path.parent for path in library_files()} == {p.parent for p in library_files() if p.name == "__init__.py"}


def test_archive_holds_every_module(archive: Path) -> None:
    found = library_modules(path.relative_to(archive).as_posix() for path in archive.rglob("*.py"))
    assert found == library_modules(path.relative_to(ROOT).as_posix() for path in library_files())


def test_sdist_holds_the_modules_and_tests_of_the_archive(archive: Path, sdist: Path) -> None:
    def sources(tree: Path) -> set[str]:
        return {path.relative_to(tree).as_posix() for path in tree.rglob("*.py")}

    assert library_modules(sources(sdist)) == library_modules(sources(archive))
    assert {name for name in sources(sdist) if name.startswith("tests/")} == {
        name for name in sources(archive) if name.startswith("tests/")
    }


def test_wheel_holds_the_modules_of_the_archive_and_nothing_beside_kvtier(archive: Path, wheel: set[str]) -> None:
    expected = library_modules(path.relative_to(archive).as_posix() for path in archive.rglob("*.py"))

    assert {module_name(name) for name in wheel if name.endswith(".py")} == expected
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"kvtier"}
    assert "kvtier/py.typed" in wheel


def test_no_library_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in library_files()}
    assert {path.name: lines for path, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    scripts = [path for top in SCRIPTS for path in (ROOT / top).rglob("*.py")]
    too_long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in (*library_files(), *scripts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= FUNCTION_LINES
    ]
    assert too_long == []
