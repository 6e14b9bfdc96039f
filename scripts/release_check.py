"""`make release-check`: what would be published, tried by somebody who has only the wheel.

It builds sdist and wheel and compares what is in them with the tracked files; installs the wheel alone in an
environment of its own and runs the demo there; then each extra by itself on top of that; and writes the licences of all
that came with it to docs/licences.md. It needs the package index, and 10 GB of disk for the time it takes.
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
"""The only data that the package carries; any other file is smaller."""
TRIED, UNTRIED = ("3.11", "3.12", "3.13"), ("3.14",)
"""Pythons that the classifiers name: the tests were run on some, and not on the others."""
OURS = {"addenda", "pip", "setuptools"}


class Extra(NamedTuple):
    """What an extra is for.

    Attributes:
        command: what is refused without it, in words that name it.
        imports: what can be imported with it.
    """

    command: tuple[str, ...]
    imports: str


EXTRAS: Mapping[str, Extra] = {
    "bench": Extra(
        ("bench", "continual", "digits"),
        "addenda.benchmarks.strategy addenda.benchmarks.continual.report matplotlib.pyplot peft vit_pytorch",
    ),
    "serve": Extra(("serve",), "addenda.serving.app addenda.serving.server"),
    "export": Extra(
        ("export-model", "--registry", "demo.db", "--format", "onnx", "--out", "model.onnx"),
        "onnx onnxscript onnxruntime",
    ),
    "postgres": Extra(("tasks", "list", "--registry", "postgresql://somebody@127.0.0.1:1/none"), "psycopg"),
    "parquet": Extra(("learn", "x", "listing.parquet", "--backbone", "glyphs"), "pyarrow.parquet"),
    "ray": Extra(
        ("predict", "digits", "--registry", "demo.db", "--ray", "local", "--out", "answers"),
        "ray.data ray.serve addenda.distributed.ray_learner addenda.distributed.prediction",
    ),
}


class Environment:
    """A virtual environment.

    Args:
        folder: where to make it.
        below: another one, whose packages it sees beside its own.
    """

    def __init__(self, folder: Path, below: Environment | None = None) -> None:
        paths = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", paths))
        self.python = Path(sysconfig.get_path("scripts", "venv", paths)) / "python"
        run(sys.executable, "-m", "venv", *([] if below is None else ["--without-pip"]), folder)
        self._pip = [self.python, "-m", "pip"]
        if below is not None:
            (self.packages / "below.pth").write_text(f"{below.packages}\n")
            self._pip = [below.python, "-m", "pip", "--python", self.python]

    def install(self, requirement: str) -> None:
        """Installs from the package index."""
        run(*self._pip, "install", "--quiet", requirement)

    def addenda(self, *arguments: str, fails: bool = False) -> str:
        """Runs a command of the package and gives what it prints."""
        return run(self.python, "-m", "addenda.cli", *arguments, fails=fails)

    def licences(self) -> dict[str, tuple[str, str]]:
        """Version and licence of each package, by its name."""
        found = {one.name: (one.version, licence(one.metadata)) for one in distributions(path=[str(self.packages)])}
        return {name: found[name] for name in sorted(found, key=str.lower) if name not in OURS}


def run(*command: object, fails: bool = False) -> str:
    """Runs a command in the current folder and gives all that it prints; SystemExit where it ends otherwise."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"COLUMNS": "200", "TMPDIR": str(Path.cwd())}  # the demo leaves its registry there
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


def faults(found: Mapping[str, int], wanted: Collection[str]) -> list[str]:
    """What is not as it should be of an archive's files: missing ones, others, and data."""
    said = [f"{name} is missing" for name in sorted(set(wanted) - found.keys())]
    said += [f"{name} does not belong there" for name in sorted(found.keys() - set(wanted))]
    large = sorted(name for name, size in found.items() if size > LARGEST_BYTES and name != DATA)
    return said + [f"{name} has {found[name]} bytes: is it data?" for name in large]


def wanted_files() -> tuple[set[str], set[str]]:
    """What the wheel holds, and what the sdist: the tracked files of the package, and what stands beside it."""
    package = set(run("git", "-C", ROOT, "ls-files", "addenda").splitlines())
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    beside = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    return package | {f"{NAME}.dist-info/{name}" for name in about}, package | beside


def licence(metadata: Message) -> str:
    """A package's licence, by what its metadata says."""
    classified = [one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier", []) if one.startswith("License")]
    named = ", ".join(name for name in classified if name != "OSI Approved")
    text = metadata.get("License", "").strip().partition("\n")[0]
    return metadata.get("License-Expression") or named or text or "not stated"


def licence_page(brought: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """A page of licences, a table for the core and one for what each extra adds to it."""
    parts = [
        "# Licences",
        f"Licences of all packages that an installation brings, as their metadata states them. Generated by "
        f"`make release-check` on {datetime.now(UTC):%Y-%m-%d} with Python {platform.python_version()} on "
        f"{platform.system()} {platform.machine()}; other platforms may install other packages. "
        f"Addenda itself: {PROJECT['license']}.",
    ]
    for extra, packages in brought.items():
        rows = [f"| {name} | {version} | {said} |" for name, (version, said) in packages.items()]
        title = "core" if extra == "core" else f"`addenda[{extra}]`, in addition to the core"
        parts.append("\n".join([f"## {title}", "", "| package | version | licence |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


class Steps:
    """Says what was seen, and how long each step took."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def done(self, what: str) -> None:
        """Ends a step."""
        print(f"{time.monotonic() - self._start:5.0f} s  {what}", flush=True)


def main() -> int:
    """Checks everything; returns 1 where something is not right."""
    steps, wrong = Steps(), []
    with tempfile.TemporaryDirectory(prefix="addenda-release-") as name, chdir(name):
        folder = Path(name)
        wheel, sdist = build(folder)
        for archive, wanted in zip((wheel, sdist), wanted_files(), strict=True):
            found = contents(archive)
            wrong += [f"{archive.name}: {fault}" for fault in faults(found, wanted)]
            steps.done(f"{archive.name}: {len(found)} files, {archive.stat().st_size / 1e6:.1f} MB")
        if wrong:
            print("\n".join(wrong))
            return 1

        core = Environment(folder / "core")
        core.install(str(wheel))
        brought = {"core": core.licences()}
        steps.done(f"core installed: {len(brought['core'])} packages")
        if "Every earlier task kept its logits, bit for bit" not in core.addenda("demo"):
            wrong.append("the demo did not say that every task kept its bits")
        steps.done("demo run")

        os.chdir(next(folder.glob("addenda-demo-*")))
        Path("listing.parquet").touch()
        extras = PROJECT["optional-dependencies"].keys() - {"all", "dev", "docs"}
        wrong += [
            f"scripts/release_check.py does not say what the extra {extra} is for" for extra in extras - EXTRAS.keys()
        ]
        for extra in sorted(extras & EXTRAS.keys()):
            said = " ".join(core.addenda(*EXTRAS[extra].command, fails=True).split())
            if f"pip install 'addenda[{extra}]'" not in said:
                wrong.append(f"without {extra}, addenda {' '.join(EXTRAS[extra].command)} says: {said[-300:]}")
            environment = Environment(folder / extra, below=core)
            environment.install(f"addenda[{extra}] @ {wheel.as_uri()}")
            run(environment.python, "-c", f"import {', '.join(EXTRAS[extra].imports.split())}")
            brought[extra] = environment.licences()
            steps.done(f"{extra} installed on top of it and imported: {len(brought[extra])} packages more")
    (ROOT / "docs" / "licences.md").write_text(licence_page(brought))
    print(
        "\n".join(wrong)
        or f"All is right on Python {platform.python_version()}; tests were not run on {', '.join(UNTRIED)}."
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
