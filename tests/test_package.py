"""The package as a newcomer meets it: what importing costs, its public names, and the README's Python."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamt1_jax

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"import sys; {statement}; print(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_framework():
    assert not {"jax", "flax", "torch", "transformers", "numpy"} & modules_after("import streamt1_jax")


def test_the_pipeline_is_imported_without_torch():
    loaded = modules_after("from streamt1_jax import StreamT1Pipeline, rollout")
    assert {"jax", "flax"} <= loaded
    assert not {"torch", "transformers", "av", "matplotlib"} & loaded


def test_every_public_name_resolves():
    for name in streamt1_jax.__all__:
        assert getattr(streamt1_jax, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        streamt1_jax.nonsense  # noqa: B018


def test_the_readme_lists_every_file_of_the_package():
    tree = (ROOT / "README.md").read_text().partition("## File tree")[2]
    mentioned = set(re.findall(r"[a-z0-9_]+\.py", tree))
    present = {
        path.name
        for folder in ("streamt1_jax", "convert", "configs", "benchmarks")
        for path in ROOT.glob(f"{folder}/*.py")
    }
    assert present - {"__init__.py"} <= mentioned


@pytest.mark.slow
def test_the_python_of_the_readme_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)  # one reader, top to bottom
    assert (tmp_path / "out.mp4").stat().st_size > 0
    assert scope["tail"].score.shape == (2, 2, 2)
