"""What scripts/release looks for, tried on wheels that are made up, and the example of README.md that it runs."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = "jax_megamoe-0.1.0-cp312-cp312-manylinux_2_28_x86_64.whl"
GOOD = {
    "jax_megamoe/__init__.py": "",
    "jax_megamoe/_core.cpython-312-x86_64-linux-gnu.so": "",
    "jax_megamoe/_core.pyi": "",
    "jax_megamoe/py.typed": "",
    "jax_megamoe/primitives/wire_test.py": "",  # the product's own
    "jax_megamoe-0.1.0.dist-info/METADATA": "Name: jax_megamoe\nVersion: 0.1.0\n",
    "jax_megamoe-0.1.0.dist-info/licenses/LICENSE": "",
}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def make_wheel(folder: Path, files: dict[str, str], name: str = NAME) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return folder / name


def test_a_good_wheel(tmp_path):
    assert script.look_through(make_wheel(tmp_path, GOOD), "0.1.0") == []


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"jax_megamoe/big": "0" * 3_000_000}, "has 3.00 MB, wanted less than 3"),
        ({"tests/test_api.py": ""}, "has tests/test_api.py, which users do not need"),
        ({"bench/run.py": ""}, "has bench/run.py"),
        ({"jax_megamoe/cuda/CMakeLists.txt": ""}, "has jax_megamoe/cuda/CMakeLists.txt"),
        ({"jax_megamoe/kernel.cu": ""}, "has jax_megamoe/kernel.cu"),
        ({"jax_megamoe/test_more.py": ""}, "has jax_megamoe/test_more.py"),
        ({"jax_megamoe-0.1.0.dist-info/METADATA": "Name: a\nVersion: 0.2.0\n"}, "is not of version 0.1.0"),
    ],
)
def test_what_does_not_belong_into_a_wheel(tmp_path, more, problem):
    (found,) = script.look_through(make_wheel(tmp_path, {**GOOD, **more}), "0.1.0")
    assert problem in found


@pytest.mark.parametrize("missing", ["py.typed", "_core.cpython-312-x86_64-linux-gnu.so", "LICENSE"])
def test_what_a_wheel_has_to_have(tmp_path, missing):
    files = {name: text for name, text in GOOD.items() if not name.endswith(missing)}
    (found,) = script.look_through(make_wheel(tmp_path, files), "0.1.0")
    assert "has no file" in found


def test_a_wheel_for_this_machine_only(tmp_path):
    wheel = make_wheel(tmp_path, GOOD, NAME.replace("manylinux_2_28", "linux"))
    assert "has no manylinux tag" in script.look_through(wheel, "0.1.0")[0]


def test_the_example_of_the_readme_runs():
    code = script.readme_example((ROOT / "README.md").read_text())
    assert "mm.moe" in code and "isfinite(y)" in code
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=200)
    with pytest.raises(ValueError, match=r"README\.md has no example"):
        script.readme_example("```python\ny = 1\n```\n")


def test_its_interpreters_are_those_of_the_classifiers():
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tuple(f"python{version}" for version in versions) == script.PYTHONS
    assert script.runs(sys.executable) and not script.runs("python3.999")


def test_arguments():
    for arguments in (["tpu"], ["--dist"]):
        with pytest.raises(SystemExit) as caught:
            script.main(arguments)
        assert caught.value.code == 2
