"""`make release-check`: builds a release and tests it as a user would install it.

It builds sdist and wheel and compares their contents with the tracked files, installs the wheel in a clean environment
and runs the demo there, adds each extra separately, and writes the licences of all installed packages to
docs/licences.md. It needs the package index, and 10 GB of temporary disk space.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Collection, Mapping
from contextlib import chdir
from datetime import UTC, datetime
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"addenda-{PROJECT['version']}"
DATA, LARGEST_BYTES = "addenda/backbones/glyphs.safetensors", 200_000
"""The only data file in the package; every other file is smaller than LARGEST_BYTES."""
TRIED, UNTRIED = ("3.11", "3.12", "3.13"), ("3.14",)
"""Python versions on which the tests were run, which the classifiers list, and versions on which they were not."""
OURS = {"addenda", "pip", "setuptools"}


class Extra(NamedTuple):
    """How an extra is tested."""

    command: tuple[str, ...]  # fails without the extra, with a message that names it
    imports: str  # modules that can be imported with the extra


EXTRAS: Mapping[str, Extra] = {
    "bench": Extra(
        ("bench", "continual", "digits"),
        "addenda.benchmarks.strategy addenda.benchmarks.continual.report matplotlib.pyplot peft vit_pytorch",
    ),
    "serve": Extra(("serve",), "addenda.serving.server"),
    "export": Extra(
        ("export-model", "--registry", "demo.db", "--format", "onnx", "--out", "model.onnx"),
        "onnx onnxscript onnxruntime",
    ),
    "heic": Extra(("predict", "digits", str(ROOT / "tests/data/photo.heic"), "--registry", "demo.db"), "pi_heif"),
    "postgres": Extra(("tasks", "list", "--registry", "postgresql://somebody@127.0.0.1:1/none"), "psycopg"),
    "parquet": Extra(("learn", "x", "listing.parquet", "--backbone", "glyphs"), "pyarrow.parquet"),
    "ray": Extra(
        ("predict", "digits", "--registry", "demo.db", "--ray", "local", "--out", "answers"),
        "ray.data ray.serve addenda.distributed.ray_learner addenda.distributed.prediction",
    ),
}


class Environment:
    """A virtual environment, which also sees the packages of the environment `base`."""

    def __init__(self, folder: Path, base: Environment | None = None) -> None:
        paths = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", paths))
        self.python = Path(sysconfig.get_path("scripts", "venv", paths)) / "python"
        run(sys.executable, "-m", "venv", *([] if base is None else ["--without-pip"]), folder)
        self._pip = [self.python, "-m", "pip"]
        if base is not None:
            (self.packages / "base.pth").write_text(f"{base.packages}\n")
            self._pip = [base.python, "-m", "pip", "--python", self.python]

    def install(self, requirement: str) -> None:
        """Installs a requirement from the package index."""
        run(*self._pip, "install", "--quiet", requirement)

    def addenda(self, *arguments: str, fails: bool = False) -> str:
        """Runs an `addenda` command and returns its output."""
        return run(self.python, "-m", "addenda.cli", *arguments, fails=fails)

    def licences(self) -> dict[str, tuple[str, str]]:
        """Version and licence of each installed package, by name."""
        installed = {d.name: (d.version, licence(d.metadata)) for d in distributions(path=[str(self.packages)])}
        return {name: installed[name] for name in sorted(installed, key=str.lower) if name not in OURS}


def run(*command: object, fails: bool = False) -> str:
    """Runs a command in the current folder and returns its output; exits if its success is not as expected."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"COLUMNS": "200", "TMPDIR": str(Path.cwd())}  # the demo writes its registry there
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean)
    if (done.returncode != 0) != fails:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-3000:]}\nexit code {done.returncode}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """Builds wheel and sdist into a folder."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder / f"{NAME}-py3-none-any.whl", folder / f"{NAME}.tar.gz"


def contents(archive: Path) -> dict[str, int]:
    """The size of each file in a wheel or an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {entry.filename: entry.file_size for entry in wheel.infolist() if not entry.is_dir()}
    with tarfile.open(archive) as sdist:
        return {entry.name.removeprefix(f"{NAME}/"): entry.size for entry in sdist if entry.isfile()}


def faults(files: Mapping[str, int], wanted: Collection[str]) -> list[str]:
    """Messages about missing, unexpected and large files of an archive."""
    messages = [f"{name} is missing" for name in sorted(set(wanted) - files.keys())]
    messages += [f"{name} does not belong there" for name in sorted(files.keys() - set(wanted))]
    large = sorted(name for name, size in files.items() if size > LARGEST_BYTES and name != DATA)
    return messages + [f"{name} has {files[name]} bytes: is it data?" for name in large]


def wanted_files() -> tuple[set[str], set[str]]:
    """The expected files of the wheel and of the sdist: the tracked files of the package, and metadata."""
    package = set(run("git", "-C", ROOT, "ls-files", "addenda").splitlines())
    dist_info = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    sdist = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    return package | {f"{NAME}.dist-info/{name}" for name in dist_info}, package | sdist


def licence(metadata: Message) -> str:
    """The licence of a package according to its metadata."""
    classifiers = [
        text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if text.startswith("License")
    ]
    named = ", ".join(name for name in classifiers if name != "OSI Approved")
    text = metadata.get("License", "").strip().partition("\n")[0]
    return metadata.get("License-Expression") or named or text or "not stated"


def licence_page(licences: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """The page of licences: a table for the core, and one for the packages that each extra adds."""
    parts = [
        "# Licences",
        f"Licences of all packages that an installation brings, as their metadata states them. Generated by "
        f"`make release-check` on {datetime.now(UTC):%Y-%m-%d} with Python {platform.python_version()} on "
        f"{platform.system()} {platform.machine()}; other platforms may install other packages. "
        f"Addenda itself: {PROJECT['license']}.",
    ]
    for extra, packages in licences.items():
        rows = [f"| {name} | {version} | {licence} |" for name, (version, licence) in packages.items()]
        title = "core" if extra == "core" else f"`addenda[{extra}]`, in addition to the core"
        parts.append("\n".join([f"## {title}", "", "| package | version | licence |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


class Steps:
    """Prints each step with the time since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def done(self, what: str) -> None:
        """Prints a finished step."""
        print(f"{time.monotonic() - self._start:5.0f} s  {what}", flush=True)


def main() -> int:
    """Runs all checks; returns 1 if any fails."""
    steps, errors = Steps(), []
    with tempfile.TemporaryDirectory(prefix="addenda-release-") as name, chdir(name):
        folder = Path(name)
        wheel, sdist = build(folder)
        for archive, wanted in zip((wheel, sdist), wanted_files(), strict=True):
            files = contents(archive)
            errors += [f"{archive.name}: {fault}" for fault in faults(files, wanted)]
            steps.done(f"{archive.name}: {len(files)} files, {archive.stat().st_size / 1e6:.1f} MB")
        if errors:
            print("\n".join(errors))
            return 1

        core = Environment(folder / "core")
        core.install(str(wheel))
        licences = {"core": core.licences()}
        steps.done(f"core installed: {len(licences['core'])} packages")
        if "Every earlier task kept its logits, bit for bit" not in core.addenda("demo"):
            errors.append("the demo did not report that every task kept its logits")
        steps.done("demo run")

        os.chdir(next(folder.glob("addenda-demo-*")))
        Path("listing.parquet").touch()
        extras = PROJECT["optional-dependencies"].keys() - {"all", "dev", "docs"}
        errors += [f"EXTRAS in scripts/release_check.py lacks the extra {extra}" for extra in extras - EXTRAS.keys()]
        for extra in sorted(extras & EXTRAS.keys()):
            output = " ".join(core.addenda(*EXTRAS[extra].command, fails=True).split())
            if f"pip install 'addenda[{extra}]'" not in output:
                errors.append(f"without {extra}, addenda {' '.join(EXTRAS[extra].command)} prints: {output[-300:]}")
            environment = Environment(folder / extra, base=core)
            environment.install(f"addenda[{extra}] @ {wheel.as_uri()}")
            run(environment.python, "-c", f"import {', '.join(EXTRAS[extra].imports.split())}")
            licences[extra] = environment.licences()
            steps.done(f"{extra} installed on top and imported: {len(licences[extra])} more packages")
    (ROOT / "docs" / "licences.md").write_text(licence_page(licences))
    print(
        "\n".join(errors)
        or f"All checks passed on Python {platform.python_version()}; tests were not run on {', '.join(UNTRIED)}."
    )
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
