"""Processes in which packages cannot be imported."""

from __future__ import annotations

import os
from pathlib import Path


def without(folder: Path, *packages: str) -> dict[str, str]:
    """The environment of such a process; what refuses them is written to a new folder in `folder`."""
    place = folder / "blocked"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    return {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
