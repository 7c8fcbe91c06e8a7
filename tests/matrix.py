"""Run parts of the suite with other versions: ``python tests/matrix.py`` (``make test-matrix``) needs uv and a network.

Every row is an environment of its own, without what it leaves out. A table of what was installed and how the tests
ended is printed last; docs/stable.md has one on record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
EAGER = ("tests/test_geometry.py", "tests/test_imports.py", "tests/test_checkpoints.py", "tests/test_llm.py")
"""tests that need neither Triton nor an extra, or skip what does"""
FUSED = (*EAGER, "tests/test_random.py", "tests/test_host.py")
ALL = (*FUSED, "tests/test_package.py", "tests/test_damaged_files.py")
SHOWN = ("torch", "triton", "numpy")


@dataclass(frozen=True)
class Row:
    name: str
    python: str
    tests: tuple[str, ...]
    extras: str = ""
    lowest: bool = False
    """the lowest versions that pyproject.toml allows, not the highest"""
    without: tuple[str, ...] = ()
    """packages to remove, which others ask for"""


ROWS = (
    Row("lowest", "3.11", ALL, extras="[hdit,lm]", lowest=True),
    Row("highest", "3.12", ALL, extras="[hdit,lm]"),
    Row("highest", "3.13", ALL, extras="[hdit,lm]"),
    Row("highest, without extras", "3.13", EAGER),
    Row("highest, without Triton", "3.12", EAGER, extras="[hdit,lm]", without=("triton",)),
)


def run(row: Row, folder: Path, options: list[str]) -> str:
    """The row of the table."""
    start = time.monotonic()
    python = str(folder / "bin" / "python")
    uv = ("uv", "--quiet")
    subprocess.run((*uv, "venv", "--python", row.python, str(folder)), check=True)
    install = (*uv, "pip", "install", "--python", python, *options)
    resolution = "lowest-direct" if row.lowest else "highest"
    subprocess.run((*install, "--resolution", resolution, f"{ROOT}{row.extras}"), check=True)
    subprocess.run((*install, "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100"), check=True)
    if row.without:
        subprocess.run((*uv, "pip", "uninstall", "--python", python, *row.without), check=True)
    listed = subprocess.run(
        (*uv, "pip", "list", "--python", python, "--format", "json"), check=True, capture_output=True
    )
    versions = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    command = (python, "-m", "pytest", "--quiet", "--no-header", "-p", "no:cacheprovider", *row.tests)
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    outcome = (done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[-1].strip("= ")
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-2000:], file=sys.stderr)
    cells = (row.name, row.python, *(versions.get(name, "-") for name in SHOWN), outcome.partition(" in ")[0])
    print(f"{row.name}, Python {row.python}: {outcome}; {time.monotonic() - start:.0f} s in all", flush=True)
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", type=int, metavar="N", help=f"numbers from 0 to {len(ROWS) - 1}; default: all"
    )
    parser.add_argument("options", nargs="*", help="options of uv pip install, after --")
    args = parser.parse_args()
    lines = [f"| packages | Python | {' | '.join(SHOWN)} | tests |", "|---|---|---|---|---|---|"]
    for number in range(len(ROWS)) if args.rows is None else args.rows:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(run(ROWS[number], Path(folder) / "venv", args.options))
    print("\n".join(lines))
    return int(any("failed" in line or "error" in line or "exit status" in line for line in lines[2:]))


if __name__ == "__main__":
    sys.exit(main())
