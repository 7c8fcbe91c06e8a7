"""The code, links, names and figures in the README and in the pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import natten_layers
from benchmarks import pages

ROOT = Path(__file__).parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", *DOCS)
NOT_RUN = "<!-- not run -->\n"
BLOCK = re.compile(rf"({re.escape(NOT_RUN)})?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PUBLIC_MODULES = (
    "natten_layers.functional",
    "natten_layers.utils.varlen",
    "natten_layers.convert",
    "natten_layers.integrations.diffusers",
    "natten_layers.integrations.transformers",
)


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, without those that are marked as not run."""
    return [code for skipped, code in BLOCK.findall((ROOT / page).read_text()) if not skipped]


def run(page: str) -> dict[str, Any]:
    """Run a page's code, each block with the names that earlier ones defined, and return all names."""
    names: dict[str, Any] = {}
    for number, code in enumerate(blocks(page)):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names


def test_the_first_example_is_short_and_trains() -> None:
    first = blocks("README.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 5
    names: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), names)
    gradients = [names["tokens"].grad, *(parameter.grad for parameter in names["attention"].parameters())]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_the_readme_runs() -> None:
    names = run("README.md")
    assert names["tokens"].shape == (2, 197, 384)
    assert names["image"].shape == (1, 64, 24, 32)
    vit, tokens = names["Block"](384, 6, kernel_size=None).attn, names["tokens"]
    patches, cls = vit(tokens[:, 1:].unflatten(1, (14, 14)), registers=tokens[:, :1])
    query, key, value = vit.qkv(tokens).unflatten(-1, (3, 6, 64)).permute(2, 0, 3, 1, 4)
    usual = vit.proj(torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(torch.cat([cls, patches.flatten(1, 2)], 1), usual)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page)])
def test_pages_run(page: str) -> None:
    run(page)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_commands_name_files_and_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"examples/\w+\.py", text):
        assert (ROOT / script).exists(), script
    for preset in re.findall(r"--preset ([\w-]+)", text):
        assert (ROOT / "natten_layers_cli" / "configs" / f"{preset}.json").exists(), preset
    for module in re.findall(r"-m ((?:natten_layers|natten_layers_cli|benchmarks)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


@pytest.mark.parametrize("page", pages.PAGES)
def test_figures_are_those_on_record(page: str) -> None:
    text = (ROOT / page).read_text()
    assert pages.filled(text) == text, "run python -m benchmarks.pages"


def test_help_and_the_reference_list_every_public_name() -> None:
    listed = natten_layers.__doc__ or ""
    reference = "\n".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    documented = re.findall(r"^(?:## |::: natten_layers\.)(.*)$", reference, re.MULTILINE)
    for name in natten_layers.__all__:
        assert re.search(rf"\b{name}\b", listed), name
        assert any(name in names.split(", ") for names in documented), name
    for module in PUBLIC_MODULES:
        assert module in listed
        name = module.removeprefix("natten_layers.")
        assert any(name in names.split(", ") for names in documented), name
