"""What `make` installs is what was tested: constraints/ pins every package that pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(extra: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{extra}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def asked_for(extra: str) -> list[Requirement]:
    groups = [PROJECT["dependencies"], *(EXTRAS[name] for name in (extra, "quickstart", "verifiers", "dev"))]
    found = [Requirement(line) for group in groups for line in group]
    return [each for each in found if each.name not in ("iterdpo", "pip")]  # pip is the interpreter's own


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_every_package_that_is_asked_for_has_a_tested_version_in_its_range(extra: str) -> None:
    pinned = pins(extra)
    for requirement in asked_for(extra):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, and constraints/{extra}.txt has {version}"


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_constraints_hold_for_any_machine(extra: str) -> None:
    """No path, no index, and no local version: `torch==2.13.0+cpu` would refuse a torch that is found elsewhere."""
    lines = (ROOT / "constraints" / f"{extra}.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []


def test_ranges_are_bounded_above_if_their_versions_are_not_dates() -> None:
    for requirement in asked_for("cpu") + asked_for("gpu"):
        bounds = {each.operator for each in requirement.specifier}
        assert "<" in bounds or requirement.name in ("fsspec", "regex", "types-PyYAML", "pandas-stubs"), requirement
