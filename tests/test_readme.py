"""What the README claims in code and in links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_trains() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    gradients = [names["tokens"].grad, *(parameter.grad for parameter in names["attention"].parameters())]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?://)([^)#]+)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_commands_name_files_and_targets_that_exist() -> None:
    (shell,) = re.findall(r"```sh\n(make.*?)```", README, re.DOTALL)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", shell, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for script in re.findall(r"examples/\w+\.py", README):
        assert (ROOT / script).exists()
    for preset in re.findall(r"--preset ([\w-]+)", README):
        assert (ROOT / "examples" / "configs" / f"{preset}.json").exists()
