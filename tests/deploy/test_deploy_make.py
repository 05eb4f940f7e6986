"""`make install` tells a Python that does not fit before anything is fetched, and goes on with one that does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A python that makes an environment with a copy of itself in it, has no pip of its own, and fetches nothing.
PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") echo "$@" >> "{log}" ;;
"--version ") echo "Python {version}" ;;
"-c "*) exec "{real}" -S -c "import sys; sys.modules['pip'] = sys; sys.version_info = ({tuple})
$2" ;;
esac
"""


def python(folder: Path, version: str) -> Path:
    path = folder / f"python{version}"
    numbers = version.replace(".", ", ")
    path.write_text(PYTHON.format(log=folder / "pip.log", version=version, real=sys.executable, tuple=numbers))
    path.chmod(0o755)
    return path


def install(folder: Path, python: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(ROOT), "install", f"VENV={folder}/venv", f"PYTHON={python}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("version", ["3.10.12", "3.15.0"])
def test_another_python_goes_on_where_the_first_did_not_fit(tmp_path: Path, version: str) -> None:
    refused = install(tmp_path, python(tmp_path, version))
    assert refused.returncode != 0
    assert f"Python {version} is not one of 3.11 to 3.14; name one that is: make install PYTHON=" in refused.stderr
    assert not (tmp_path / "pip.log").exists()
    done = install(tmp_path, python(tmp_path, "3.12.3"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv/bin/python").read_bytes() == (tmp_path / "python3.12.3").read_bytes()
    assert "--constraint constraints.txt torch\n" in (tmp_path / "pip.log").read_text()


def test_an_environment_that_fits_stays_and_one_without_pip_does_not(tmp_path: Path) -> None:
    first, second = python(tmp_path, "3.11.9"), python(tmp_path, "3.14.0")
    assert install(tmp_path, first).returncode == 0
    (tmp_path / "venv/.installed").unlink()
    assert install(tmp_path, second).returncode == 0
    place = tmp_path / "venv/bin/python"
    assert place.read_bytes() == first.read_bytes()
    (tmp_path / "venv/.installed").unlink()
    place.write_text(place.read_text().replace("sys.modules['pip'] = sys; ", "sys.modules['pip'] = None; "))
    assert install(tmp_path, second).returncode == 0
    assert place.read_bytes() == second.read_bytes()


def test_what_a_link_in_its_place_leads_to_stays(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere" / "bin" / "python"
    kept.parent.mkdir(parents=True)
    kept.write_text("#!/bin/sh\nexit 1\n")
    kept.chmod(0o755)
    (tmp_path / "venv").symlink_to(tmp_path / "elsewhere")
    done = install(tmp_path, python(tmp_path, "3.12.3"))
    assert done.returncode == 0, done.stderr
    assert kept.read_text() == "#!/bin/sh\nexit 1\n"


def test_make_and_the_package_and_the_readme_name_the_same_pythons() -> None:
    package = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert package is not None
    first, stop = map(int, package.groups())
    makefile = (ROOT / "Makefile").read_text()
    assert f"not (3, {first}) <= sys.version_info < (3, {stop})" in makefile
    for text in (makefile, (ROOT / "README.md").read_text()):
        assert f"3.{first} to 3.{stop - 1}" in text
