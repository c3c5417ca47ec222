"""The import rule, the order inside each package, the file-size cap, and what may be imported where."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from vlm_distill_cache.common.codecs.registry import CODECS

ROOT = Path(__file__).resolve().parent.parent
ORDER = {  # inside a package, each level imports only what stands before it
    "common": (
        "errors printing", "locations", "files pixels attention", "hub", "cache models config", "codecs recipes",
        "terminal remotes",
        "opening", "tools", "cli",
    ),
    "data": ("sample", "images", "text", "sources shapes photos families", "builtin", "benchmarks", "registry", "questions"),
    "stage1_teacher": (
        "config teacher demo builtin", "loop", "planning", "quality", "extract live", "extend", "estimate report", "imports",
        "cli",
    ),
    "stage2_student": (
        "loss_weights", "pruned_folder final_folder presets", "config", "students batches", "exports", "losses",
        "training", "scores", "trained_student", "train prune", "suite", "run", "cli",
    ),
}  # fmt: skip
PACKAGES = tuple(ORDER)
MAY_IMPORT = {
    "common": {"common"},
    "data": {"common", "data"},
    "stage1_teacher": {"common", "data", "stage1_teacher"},
    "stage2_student": {"common", "data", "stage2_student"},
}
MAX_LINES = 600
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_names(tree: ast.AST, path: Path) -> set[str]:
    """Full names of what is imported anywhere in a file; of ours without the package's own name."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("vlm_distill_cache.") for name in names}


@cache
def imported_modules(path: Path) -> set[str]:
    """Which modules of ours a file imports."""
    found: set[str] = set()
    for name in imported_names(parsed(path), path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


def test_every_package_has_files_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_what_the_rule_allows(path: Path):
    package = path.relative_to(ROOT).parts[0]
    tree = parsed(path)
    firsts = {name.partition(".")[0] for name in imported_names(tree, path)}
    assert firsts & set(PACKAGES) <= MAY_IMPORT[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_sub_packages_import_only_what_stands_before_them(package: str):
    level = {name: number for number, names in enumerate(ORDER[package]) for name in names.split()}
    for path in (path for path in FILES if path.relative_to(ROOT).parts[0] == package):
        inner = path.relative_to(ROOT / package).with_suffix("").parts[0]
        if inner == "__init__":
            continue
        for name in imported_modules(path):
            owner, _, rest = name.partition(".")
            part = rest.partition(".")[0]
            if owner == package and part and part != inner:
                assert level[part] < level[inner], f"{path.relative_to(ROOT)} imports {name}"


def test_no_circle_of_imports():
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_tops_stay_small():
    for package in PACKAGES:
        entries = [p for p in (ROOT / package).iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
        assert len(entries) <= 18, package


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_nothing_of_ours_is_unpickled():
    for path in FILES:
        tree = parsed(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                weights_only = [k for k in node.keywords if k.arg == "weights_only"]
                assert weights_only, f"{path}: torch.load without weights_only"
                assert ast.unparse(weights_only[0].value) == "True", f"{path}: torch.load unpickles"
        # The name of the error that torch.load raises is all that may be imported of pickle.
        imported = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        nodes = [n for n in imported if ast.unparse(n) != "from pickle import UnpicklingError"]
        imports = {name.partition(".")[0] for name in imported_names(ast.Module(body=nodes, type_ignores=[]), path)}
        assert not imports & {"pickle", "dill", "joblib"}, path


@pytest.mark.parametrize(
    "module",
    [
        "common.cli", "common.tools.verify", "common.tools.convert", "common.remotes.pull", "common.cache.manifest",
        "common.cache.reader", "common.config", "common.codecs", "common.codecs.checks", "common.attention.layers",
        "stage1_teacher.cli", "stage1_teacher.imports.cli", "stage2_student.cli",
    ],
)  # fmt: skip
@pytest.mark.slow(quick=2)
def test_command_lines_and_cache_tools_start_without_torch(module: str):
    code = f"import vlm_distill_cache.{module}, sys; sys.exit(bool({{'torch', 'transformers', 'av'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


NOT_FOR_HELP = (
    "numpy", "yaml", "PIL", "zarr", "numcodecs", "safetensors", "torch", "transformers", "tqdm", "huggingface_hub", "asyncio",
    "concurrent", "email", "hashlib", "http", "importlib.metadata", "multiprocessing", "socket", "ssl", "subprocess", "tempfile",
)  # fmt: skip


@pytest.mark.parametrize(
    ("package", "words"),
    [("common", "inspect --help"), ("common", "verify --help"), ("common", "--help"), ("stage1_teacher", "--help")],
)
def test_help_comes_at_once(package: str, words: str):
    """Counted in modules, since seconds depend on the machine: half of the 380 that it once took, and none that are large."""
    code = (
        "import sys; from vlm_distill_cache.commands import group_of; "
        f"group_of({package!r}).main({words.split()!r}, standalone_mode=False); print(*sys.modules, file=sys.stderr)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    modules = told.stderr.split()
    assert "Usage: " in told.stdout
    assert [name for name in modules if name in NOT_FOR_HELP] == []
    assert len(modules) < 190


def names_of_signals(path: Path) -> set[str]:
    """Signals named in a file: as a quoted word, as a loss's weight, as a key of a preset."""
    if path.suffix == ".yaml":
        return {name for name in CODECS if re.search(rf"^\s*{name}:", path.read_text(), re.MULTILINE)}
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.AnnAssign) and path.name == "loss_weights.py":
            found.add(ast.unparse(node.target))
    return found & CODECS.keys()


def test_a_signals_name_stands_in_few_files():
    # "hidden" is also a key of a projector's sizes, and those files know no signals
    sizes = {"projectors.py", "published.py", "published_configs.py", "vision_language.py", "table.py", "build.py"}
    presets = [path for package in PACKAGES for path in (ROOT / package).rglob("*.yaml")]
    # "answers" is a key of data files, too, whose readers know no signals
    known = [path for path in FILES if not {"sources", "benchmarks", "suite"} & {*path.relative_to(ROOT).parts}]
    places = Counter(name for path in [*known, *presets] if path.name not in sizes for name in names_of_signals(path))
    assert places.keys() == CODECS.keys()
    assert max(places.values()) <= 7, places
