"""What the package says of itself: public names, version, metadata, entry points, and what importing it costs."""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import agentcluster
from agentcluster import errors

CHECKOUT = Path(agentcluster.__file__).parents[1]

HEAVY = {"asyncssh", "cloudpickle", "cryptography", "dask", "distributed", "ipywidgets", "pynvml", "tornado"}


def imported_after(code: str) -> set[str]:
    """Return the top-level modules that a new Python has after `code`."""
    code = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_importing_it_imports_nothing_heavy() -> None:
    assert imported_after("import agentcluster") & HEAVY == set()
    assert imported_after("import agentcluster; agentcluster.__version__, dir(agentcluster)") & HEAVY == set()
    assert imported_after("from agentcluster import ConfigError") & HEAVY == set()


def test_a_client_needs_neither_ssh_nor_a_gpu_stack() -> None:
    assert imported_after("from agentcluster import Host, Mode") & {"asyncssh", "distributed", "pynvml"} == set()
    # distributed imports pynvml itself, where that is installed.
    assert imported_after("from agentcluster import AgentCluster") & {"asyncssh", "cuda", "dask_cuda"} == set()


def typed() -> dict[str, str]:
    """Return public name -> module, as ``__init__`` tells type checkers, which import neither lazily nor by a table."""
    tree = ast.parse(Path(agentcluster.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_public_names() -> None:
    assert set(agentcluster.__all__) == {*typed(), "__version__"}
    assert agentcluster.__all__ == sorted(agentcluster.__all__)
    assert set(agentcluster.__all__) <= set(dir(agentcluster))
    assert set(errors.__all__) - {"suggest"} <= set(agentcluster.__all__)


@pytest.mark.parametrize("name", sorted(typed()))
def test_public_name_is_what_type_checkers_see(name: str) -> None:
    vars(agentcluster).pop(name, None)  # look it up again, as the first time
    value = getattr(agentcluster, name)
    assert value is getattr(importlib.import_module(typed()[name]), name)
    assert value.__name__ == name
    assert value.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'agentcluster' has no attribute 'AgentClutser'"):
        agentcluster.AgentClutser  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'suggest'"):
        exec("from agentcluster import suggest")


def version_of_a_checkout_that_is_not_installed(before: str = "") -> str:
    """Return the version that a new Python reads where no metadata of the package are found."""
    code = (
        "import sys\n"
        "from importlib import metadata\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = missing\n"
        f"{before}\n"
        "import agentcluster; print(agentcluster.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    return done.stdout.strip()


def test_the_version_comes_from_tags_and_nothing_else() -> None:
    setup = configparser.ConfigParser()
    assert setup.read(CHECKOUT / "setup.cfg")
    assert "version" not in setup["metadata"]
    assert agentcluster.__version__ == metadata.version("agentcluster")
    assert agentcluster.__version__ == str(Version(agentcluster.__version__))


def test_a_checkout_that_is_not_installed_has_the_version_of_its_tags() -> None:
    import setuptools_scm

    wanted = setuptools_scm.get_version(str(CHECKOUT), fallback_version="0+unknown")
    assert version_of_a_checkout_that_is_not_installed() == wanted


def test_without_setuptools_scm_that_version_is_unknown() -> None:
    assert version_of_a_checkout_that_is_not_installed("sys.modules['setuptools_scm'] = None") == "0+unknown"


def entry_points(group: str) -> dict[str, str]:
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    lines = setup["options.entry_points"][group].strip().splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}


def test_the_commands() -> None:
    assert entry_points("console_scripts") == {
        "agentcluster": "agentcluster.cli.main:main",
        "dask-agent": "agentcluster.cli.dask_agent:main",
    }
    for value in entry_points("console_scripts").values():
        module, _, attribute = value.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def test_dask_has_the_command_agent() -> None:
    import click

    module, _, attribute = entry_points("dask_cli")["agent"].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    assert command.name == "agent"


def test_the_installed_files() -> None:
    """Once the package is installed, what it reads at run time is installed with it."""
    package = Path(agentcluster.__file__).parent
    for name in ("agentcluster.yaml", "agentcluster-schema.yaml", "py.typed"):
        assert (package / name).is_file(), name
    try:
        installed = metadata.metadata("agentcluster")
    except metadata.PackageNotFoundError:
        pytest.skip("agentcluster is not installed here")
    assert installed["Requires-Python"] == ">=3.11"
    assert {"gpu-cu12", "gpu-cu13", "jupyter", "test", "lint", "docs", "complete"} <= set(
        installed.get_all("Provides-Extra") or ()
    )


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme = (CHECKOUT / "README.rst").read_text()
    ci = (CHECKOUT / ".ci" / "run").read_text()
    for command in (
        "python -m pip install . && agentcluster demo",
        'python -m pip install -e ".[test]" && python -m pytest',
    ):
        assert f"\n    {command}\n" in readme
        assert f"\n    {command}\n" in ci


def listed(section: str, option: str) -> set[str]:
    """Return the lines of a list in setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    return set(setup[section][option].strip().splitlines())


def test_conda_recipe_has_the_requirements_and_commands_of_the_package() -> None:
    recipe = yaml.safe_load((CHECKOUT / "conda.recipe" / "recipe.yaml").read_text())
    wanted = {line.replace("dask>", "dask-core>") for line in listed("options", "install_requires")}
    run = {line.replace(" ", "") for line in recipe["requirements"]["run"]}
    assert run == {"python" + listed("options", "python_requires").pop(), *wanted}
    commands = dict(line.split(" = ") for line in recipe["build"]["python"]["entry_points"])
    assert commands == entry_points("console_scripts")


def test_hook_of_mypy_has_what_the_package_imports() -> None:
    config = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())
    (mypy,) = (hook for repo in config["repos"] for hook in repo["hooks"] if hook["id"] == "mypy")
    installed = {line for line in mypy["additional_dependencies"] if not line.startswith("mypy==")}
    extras = {name: listed("options.extras_require", name) for name in ("dashboard", "lint")}
    known = listed("options", "install_requires") | extras["dashboard"] | extras["lint"]
    assert installed <= known
    assert extras["dashboard"] <= installed
    assert all(str(repo["rev"]).startswith("v") for repo in config["repos"] if repo["repo"] != "local")


def test_workflows_call_steps_that_exist() -> None:
    steps = set(re.findall(r"run_step (\w+)", (CHECKOUT / ".ci" / "run").read_text()))
    called: set[str] = set()
    for path in sorted((CHECKOUT / ".github" / "workflows").glob("*.yml")):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            called |= set(job.get("strategy", {}).get("matrix", {}).get("step", ()))
            for command in re.findall(r"\.ci/run (.*)", "\n".join(step.get("run", "") for step in job["steps"])):
                called |= {word for word in command.split() if word != '"$STEP"'}
    assert called == steps
