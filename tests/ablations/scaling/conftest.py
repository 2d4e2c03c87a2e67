"""Where public loss data lies, for tests that need it: `SCALING_DATA`, or ../shared/scaling beside the checkout."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def public_data():
    """By name of a file in the folder of public loss data: its path, or a skip that names it."""
    folder = Path(os.environ.get("SCALING_DATA", ROOT.parent / "shared" / "scaling"))

    def find(name):
        if not (folder / name).exists():
            pytest.skip(f"{name} is not in {folder}; set SCALING_DATA to the folder of public loss data")
        return folder / name

    return find
