"""Imports point one way: rooms have ranks, and a module imports from rooms of lower rank, or from its own room.

Read from the source, not from what is loaded, so that imports inside functions count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import natten_layers

ROOT = Path(natten_layers.__file__).parent
RANKS = (
    {"wording"},
    {"io", "geometry", "kernels"},  # the last one is empty
    {"kernels.host"},
    {"kernels.portable"},
    {"kernels.sm90"},
    {"kernels.dispatch"},
    {"kernels.ops"},
    {"position_bias"},
    {"tiles"},
    {"tile_attention"},
    {"eager"},
    {"head_axes"},
    {"checks"},
    {"arguments"},
    {"operations"},
    {"varlen"},
    {"cached", "explanation", "natten"},
    {"functional", "utils"},
    {"modules"},
    {"convert", "integrations", "tune"},
    {""},  # the package itself, which gathers the public names
)
"""Modules and packages by rank, the lowest first: a package stands for all that is in it, unless that has its own."""
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


@cache
def modules() -> dict[str, Path]:
    """All modules by their name below the package's."""
    paths = sorted(ROOT.rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): p for p in paths}


def room_of(module: str) -> str:
    """The longest name that has a rank."""
    while module not in RANK:
        assert "." in module, f"{module} has no rank: give it one"
        module = module.rpartition(".")[0]
    return module


def imports(module: str, path: Path) -> set[str]:
    """Our own modules that one imports when it runs: by any statement, or by ``ops.define.module`` on a launch."""
    known, found = modules(), set[str]()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in node.body
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                base = ".".join(parts[: len(parts) - node.level + 1])
                base = ".".join(filter(None, (base, node.module)))
            elif (node.module or "").partition(".")[0] == "natten_layers":
                base = (node.module or "").partition(".")[2]
            else:
                continue
            below = {".".join(filter(None, (base, alias.name))) for alias in node.names}
            found |= {name if name in known else base for name in below}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "natten_layers"]
            found |= {name.partition(".")[2] for name in names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "module":
            (name,) = node.args
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno} loads a module that nobody can read"
            found.add(f"kernels.{name.value}")
    return found


def test_imports_point_down() -> None:
    climbing = [
        f"{module or 'natten_layers'} imports {other}"
        for module, path in modules().items()
        for other in sorted(imports(module, path))
        if RANK[room_of(other)] > RANK[room_of(module)]
        or (RANK[room_of(other)] == RANK[room_of(module)] and room_of(other) != room_of(module))
    ]
    assert not climbing


def test_no_module_imports_itself_by_a_detour() -> None:
    """Raises ``graphlib.CycleError``, which names the circle."""
    TopologicalSorter({module: imports(module, path) - {module} for module, path in modules().items()}).prepare()


def test_kernels_know_nothing_of_who_calls_them() -> None:
    callers = {"operations", "functional", "natten", "eager", "modules", "arguments", "cached"}
    callers |= {"explanation", "hf", "integrations"}
    for module, path in modules().items():
        if module.startswith("kernels."):
            found = {name.partition(".")[0] for name in imports(module, path)} & callers
            assert not found, f"{module} imports {found}"


def test_kernels_take_arguments_of_operators_by_name() -> None:
    """A slice, or a name behind a star, would mean another argument once there is one more."""
    groups = {"inputs", "options", "cotangents", "saved", "tangents", "problem"}
    found = []
    for module, path in modules().items():
        if not module.startswith("kernels.") or module.startswith("kernels.ops."):  # torch gives operators a flat tuple
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Subscript(value=ast.Name(id=name), slice=ast.Slice()) if name in groups:
                    found.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
                case ast.Assign(targets=[ast.Tuple(elts=[*names, _])], value=ast.Name(id=name)) if name in groups:
                    if any(isinstance(each, ast.Starred) for each in names):
                        found.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
    assert not found


def test_the_package_needs_neither_triton_nor_numpy_nor_the_compiler() -> None:
    """Neither importing the package nor eager attention, ``explain`` and a model import one of them."""
    script = """
import sys, warnings
sys.modules["triton"] = sys.modules["numpy"] = None
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own
import torch, natten_layers
q = torch.randn(1, 8, 2, 16, requires_grad=True)
natten_layers.neighborhood_attention(q, q, q, 3).sum().backward()
assert "not fused" in str(natten_layers.explain(q, q, q, 3))
levels = natten_layers.LevelConfig(1, 16, d_head=8), natten_layers.LevelConfig(1, 16, "global", d_head=8)
natten_layers.HDiT(natten_layers.HDiTConfig(levels))(torch.randn(1, 3, 32, 32), torch.ones(1))
assert not any(name.startswith("natten_layers.kernels.") and name.split(".")[2] in ("portable", "sm90", "dispatch")
               for name in sys.modules)
x = torch.randn(7, 2, 16)  # packed samples, as compiled code leaves its graph for them
natten_layers.neighborhood_attention_varlen(x, x, x, [(3,), (4,)], 3)
assert "torch._dynamo" not in sys.modules  # it takes a second, and sets variables of the environment
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_models_are_read_and_built_without_the_compiler(tmp_path: Path) -> None:
    """On the meta device, where all models are built whose weights come from a file."""
    script = """
import sys, torch
from natten_layers import DecoderLM, DecoderLMConfig, HDiT, HDiTConfig, LevelConfig, NeighborhoodGQA

levels = LevelConfig(1, 16, d_head=8, is_periodic=(False, True)), LevelConfig(1, 16, "global", d_head=8)
diffusion = HDiTConfig(levels, num_classes=3, mapping_width=8)
HDiT(diffusion).save_pretrained(sys.argv[1] + "/hdit.safetensors")
HDiT.from_pretrained(sys.argv[1] + "/hdit.safetensors")
sizes = {"vocab_size": 5, "hidden_size": 8, "intermediate_size": 4, "num_layers": 1, "num_heads": 2, "head_dim": 4}
yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
language = DecoderLMConfig(**sizes, rope=yarn)
DecoderLM(language).save_pretrained(sys.argv[1] + "/lm")
DecoderLM.from_pretrained(sys.argv[1] + "/lm")
with torch.device("meta"):
    for model in HDiT(diffusion), DecoderLM(language), NeighborhoodGQA(16, 2, kernel_size=3, num_registers=2):
        assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
assert "torch._dynamo" not in sys.modules  # it takes seconds
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
