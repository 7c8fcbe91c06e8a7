"""The configs of image models that come with the commands."""

from __future__ import annotations

from pathlib import Path

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
"""By name"""
