"""Prints the lowest versions that pyproject.toml allows, as constraints for pip.

python .ci/lowest.py test parity plan > constraints.txt
"""

import re
import sys
import tomllib
from pathlib import Path

BOUND = re.compile(r"([\w.-]+)(?:\[[\w,.-]+\])?>=([\w.]+)")


def lowest(project: dict, extras: list[str]) -> dict[str, str]:
    """Of the dependencies and some extras, the lowest version of each package."""
    optional = project["optional-dependencies"]
    found: dict[str, str] = {}
    for requirement in [
        *project["dependencies"],
        *[requirement for extra in extras for requirement in optional[extra]],
    ]:
        bound = BOUND.fullmatch(requirement)
        if bound is None:
            sys.exit(f"{requirement!r} is not of the form NAME>=VERSION")
        name, version = bound.groups()
        if found.setdefault(name, version) != version:
            sys.exit(f"{name} has two lower bounds, {found[name]} and {version}: make them one")
    return found


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    for name, version in lowest(project, sys.argv[1:]).items():
        print(f"{name}=={version}")
