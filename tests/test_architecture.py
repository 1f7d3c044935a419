"""Laws of the package's shape: who imports whom, what an import brings along, what is explained, what is never read."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mcm_jax"

# A module imports from its own layer and from those before it. `mcm_jax/__init__.py` stands above all.
LAYERS = (
    "version",
    "errors",
    "files",
    "plugins",
    "distributed",
    "config",
    "assets",
    "sharding",
    "schedules",
    "predictions",
    "base",
    "modalities",
    "mcm",
    "losses",
    "draws",
    "samplers",
    "sampling",
    "control",
    "data",
    "trained",
    "pictures",
    "engine",
    "request",
    "pipeline",
    "data.synthesise",  # draws pictures for a data set
    "data.__main__",  # its command
    "cache",
    "evaluation",
    "training",
    "sweep",
    "jobs",
    "generate",
    "cli",
)
SCRIPTS = ("precompute.py", "train.py", "sample.py", "evaluate.py")
HEAVY = ("torch", "diffusers", "transformers", "tensorflow")
# Modules that are of use only with an extra: the core install cannot import them, and nothing may import them for it.
EXTRAS = {"mcm_jax.base.torch_bridge"}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def _module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def _layer(module):
    """The part after ``mcm_jax``, or the two of a module with a layer of its own; empty for the package itself."""
    parts = module.split(".")[1:3]
    return ".".join(parts) if ".".join(parts) in LAYERS else "".join(parts[:1])


def imported_modules(name, tree, *, is_package):
    """Dotted names of all that a module imports, anywhere in it. A name imported from a package counts as a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                origin = ".".join(package + ([node.module] if node.module else []))
            found |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def upward_imports(name, imported, layers=LAYERS):
    """The imports that the order of layers forbids to the module ``name``."""
    if name == "mcm_jax":
        return []
    if _layer(name) not in layers:
        return [f"{name} itself, which has no layer"]
    own = layers.index(_layer(name))
    wrong = []
    for target in sorted(imported):
        if target.split(".")[0] != "mcm_jax":
            continue
        layer = _layer(target)
        # `import mcm_jax` and `from mcm_jax import MCM` reach up to the package's own list of names.
        if layer not in layers or layers.index(layer) > own:
            wrong.append(target)
    return wrong


def test_import_checker_sees_what_it_should():
    source = "\n".join(
        (
            "import jax, mcm_jax.losses",
            "from mcm_jax import training",
            "from mcm_jax.base.unet import UNet",
            "from . import cache",
            "from .data.scenes import render",
            "def f():",
            "    from .. import sampling",
            "    importlib.import_module('mcm_jax.evaluation')",
        )
    )
    imported = imported_modules("mcm_jax.mcm", ast.parse(source), is_package=False)
    assert upward_imports("mcm_jax.mcm", imported) == [
        "mcm_jax.cache",
        "mcm_jax.data.scenes.render",
        "mcm_jax.evaluation",
        "mcm_jax.losses",
        "mcm_jax.training",
    ]
    assert upward_imports("mcm_jax.generate", imported) == []
    assert upward_imports("mcm_jax.training.loop", {"mcm_jax", "mcm_jax.MCM"}) == ["mcm_jax", "mcm_jax.MCM"]
    relative = imported_modules("mcm_jax.base", ast.parse("from .unet import UNet"), is_package=True)
    assert relative == {"mcm_jax.base.unet.UNet"}


def test_every_module_has_a_layer():
    strangers = {_layer(name) for name in MODULES} - {""} - set(LAYERS)
    assert not strangers, f"give these a place in LAYERS, and in the design: {sorted(strangers)}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    imported = imported_modules(name, TREES[name], is_package=MODULES[name].name == "__init__.py")
    wrong = upward_imports(name, imported)
    assert not wrong, f"{name} may not import {wrong}; the order is {', '.join(LAYERS)}"


@pytest.mark.parametrize("name", MODULES)
def test_package_knows_nothing_of_scripts_configs_and_tests(name):
    imported = imported_modules(name, TREES[name], is_package=MODULES[name].name == "__init__.py")
    outside = {"configs", "tests", "tools", "benchmarks", *(s.removesuffix(".py") for s in SCRIPTS)}
    assert not {m.split(".")[0] for m in imported} & outside


def test_a_config_enters_by_one_module():
    """Below it there are settings: nobody else sees a ConfigDict."""
    knowing = {
        name
        for name, tree in TREES.items()
        if any(m.split(".")[0] == "ml_collections" for m in imported_modules(name, tree, is_package=False))
    }
    assert knowing == {"mcm_jax.config"}


def test_every_folder_of_modules_is_a_package():
    """Or it would be missing from the installed package."""
    folders = {path.parent for path in MODULES.values()}
    assert not [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]


def _run(source):
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_import_brings_no_other_framework():
    result = _run(f"import sys, mcm_jax; print([m for m in {HEAVY} if m in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_module_imports_without_other_frameworks():
    """As on a core install, where none of them is there (tensorboardX would import torch if it could)."""
    names = sorted(set(MODULES) - EXTRAS)
    result = _run(
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY}))\n"  # None there makes the import an ImportError
        f"for name in {names}: importlib.import_module(name)"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short(script):
    assert len((ROOT / script).read_text(encoding="utf-8").splitlines()) < 70


def unsafe_reads(tree):
    """Places that read a format which can run code: pickles in any dress."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            wrong += [(node.lineno, root) for root in roots if root.split(".")[0] in UNPICKLERS]
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                wrong += [(node.lineno, "torch.load") for a in node.names if a.name == "load"]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            wrong += [(node.lineno, name)] if name == "pd.read_pickle" else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            restricted = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            wrong += [] if restricted else [(node.lineno, "torch.load")]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            safe = isinstance(node.value, ast.Constant) and node.value.value is False
            wrong += [] if safe else [(node.value.lineno, "allow_pickle")]
    return wrong


def test_unsafe_read_checker_sees_what_it_should():
    bad = (
        "import pickle",
        "from pickle import load",
        "import torch\ntorch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=safe)",
        "from torch import load",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
    )
    assert all(unsafe_reads(ast.parse(source)) for source in bad)
    assert not unsafe_reads(ast.parse("torch.load(p, map_location=d, weights_only=True)"))
    assert not unsafe_reads(ast.parse('"""Never torch.load."""\nnp.load(p, allow_pickle=False)\njson.load(f)'))


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_unpickled(name):
    assert not unsafe_reads(TREES[name])


def undocumented(tree, prefix="", *, flax=False):
    """Public functions, classes and methods without a docstring. Nested functions are nobody's interface."""
    missing = []
    for node in tree.body:
        if isinstance(node, ast.If | ast.Try):
            missing += undocumented(node, prefix, flax=flax)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        is_class = isinstance(node, ast.ClassDef)
        exempt = flax and node.name == "setup"
        # A property's setter is explained with its getter.
        exempt |= any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in node.decorator_list)
        if not exempt and ast.get_docstring(node) is None:
            missing.append(prefix + node.name)
        if is_class:
            bases = {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
            missing += undocumented(node, f"{prefix}{node.name}.", flax="Module" in bases)
    return missing


def test_docstring_checker_sees_what_it_should():
    source = """
def bare():
    def nested(): pass
def _private(): pass
def said():
    "Says."
class Net(nn.Module):
    "A net."
    def setup(self): pass
    def __call__(self, x): pass
    def encode(self, x): pass
class Plain:
    def setup(self): pass
    @property
    def a(self): "Is."
    @a.setter
    def a(self, value): pass
if True:
    def guarded(): pass
"""
    assert undocumented(ast.parse(source)) == ["bare", "Net.encode", "Plain", "Plain.setup", "guarded"]


@pytest.mark.parametrize("name", MODULES)
def test_module_says_what_it_is_for(name):
    assert ast.get_docstring(TREES[name]), f"{MODULES[name].relative_to(ROOT)} begins without a docstring"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    assert not undocumented(TREES[name])
