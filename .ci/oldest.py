"""Print the lower bounds of pyproject.toml's dependencies as exact pins, one a line."""

import pathlib
import tomllib

project = pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml"
for requirement in tomllib.loads(project.read_text())["project"]["dependencies"]:
    print(requirement.replace(">=", "=="))
