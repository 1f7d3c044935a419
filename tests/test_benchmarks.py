"""What the benchmarks and tools share: they can be imported, and refuse what does not belong together."""

import ast
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import common, sweep_results
from tools import work

FILES = sorted([*(tiny.ROOT / "benchmarks").rglob("*.py"), *(tiny.ROOT / "tools").glob("*.py")])


def names_of(path):
    """What a module has at its top level; None where it is not a file of ours."""
    if not (path.is_dir() or path.with_suffix(".py").exists()):
        return None
    names = {p.stem for p in path.glob("*")} if path.is_dir() else set()
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text() if file.exists() else "")):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_what_is_imported_is_there(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("benchmarks", "tools", "mcm_jax"):
            there = names_of(tiny.ROOT / node.module.replace(".", "/"))
            assert there is not None, node.module
            assert {alias.name for alias in node.names} <= there, node.module


def test_flops_are_counted_once_and_leave_no_trace():
    traced = []

    @jax.jit
    def inner(a, b):
        traced.append(jax.default_backend())
        return a @ b

    a, b = jnp.ones((640, 320)), np.ones((320, 160), np.float32)
    inner(a, b)
    found = common.gflop(lambda a, b: inner(a, b) + inner(a, b), a, b)
    assert found == pytest.approx(2 * 2 * 640 * 320 * 160 / 1e9, rel=0.05)
    inner(a, b)
    assert len(traced) == 3  # what was traced to be counted does not run


def test_a_work_folder_is_of_one_recipe(tmp_path):
    work.claim(tmp_path / "a", {"steps": 5, "betas": (0.9, 0.99)})
    (tmp_path / "a/state.pt").write_text("weights")
    work.claim(tmp_path / "a", {"steps": 5, "betas": (0.9, 0.99)})
    with pytest.raises(SystemExit, match="holds work of another recipe .steps differ."):
        work.claim(tmp_path / "a", {"steps": 6, "betas": (0.9, 0.99)})
    (tmp_path / "a/work_of.json").unlink()
    with pytest.raises(SystemExit, match="files of an unknown recipe"):
        work.claim(tmp_path / "a", {"steps": 5})


def test_a_rate_with_a_trial_that_diverged_is_not_the_best(tmp_path, monkeypatch):
    (tmp_path / "sweep.json").write_text(json.dumps({"config": {"base": {"path": "x"}}}))
    lines = ["trial,status,size,learning_rate,mean_iou"]
    lines += ["0,done,a,0.1,0.5", "1,done,a,0.1,0.6", "2,done,a,0.2,0.9", "3,diverged,a,0.2,", "4,diverged,b,0.1,"]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["", f"--sweep={tmp_path}", "--axis=size", f"--out={out}"])
    sweep_results.main()
    rows = json.loads(out.read_text())["rows"]
    assert rows["a"]["best_learning_rate"] == "0.1" and rows["a"]["rates"]["0.2"]["diverged"] == 1
    assert rows["b"]["best_learning_rate"] is None
    with pytest.raises(SystemExit, match="no trial 7; there are 5"):
        sweep_results.done_trials(tmp_path, ["size"], [7])
    with pytest.raises(SystemExit, match="nothing there is called 'form'; the columns .* are trial, status"):
        sweep_results.done_trials(tmp_path, ["form"])
    (tmp_path / "results.csv").write_text("\n".join([*lines, "5,torn,b,0.2,"]) + "\n")
    with pytest.raises(SystemExit, match="trials 5 are not done"):
        sweep_results.done_trials(tmp_path, ["size"])
