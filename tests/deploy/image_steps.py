"""The Dockerfile's steps in an empty folder and a new virtual environment, where there is no Docker.

    python tests/deploy/image_steps.py [FOLDER]

Each COPY and RUN as it stands, in order, with the Dockerfile's environment and working folders below FOLDER (default: a
temporary one, removed afterwards). What changes the system itself is left out, and said so. Takes minutes and 6 GB: torch.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
OF_THE_SYSTEM = ("apt-get ", "useradd ")
"""How commands begin that need root and change the machine: Debian's packages, and the user."""


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction of a Dockerfile, its lines joined."""

    name: str
    argument: str

    @property
    def is_of_the_system(self) -> bool:
        return self.name == "RUN" and self.argument.startswith(OF_THE_SYSTEM)


def steps(dockerfile: str) -> list[Step]:
    """The instructions of a Dockerfile's text."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Step(name.upper(), " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined)]


def copies(step: Step, context: Path) -> tuple[list[Path], str]:
    """What a COPY copies out of the context, and where to."""
    *patterns, target = shlex.split(step.argument)
    return [path for pattern in patterns for path in sorted(context.glob(pattern))], target


@dataclass(slots=True)
class Folder:
    """Stands for the image's file system."""

    root: Path
    context: Path = ROOT
    cwd: str = "/"
    env: dict[str, str] = field(default_factory=dict)

    def path(self, inside: str) -> Path:
        """Where a path of the image lies."""
        return self.root / os.path.join(self.cwd, inside).lstrip("/")

    def do(self, step: Step) -> None:
        """Carry out one step.

        Raises:
            CalledProcessError: a command failed.
        """
        if step.name == "ENV":
            self.env |= dict(each.split("=", 1) for each in shlex.split(step.argument))
            self.env["TORCH_HOME"] = str(self.path(self.env.get("TORCH_HOME", "")))
        elif step.name == "WORKDIR":
            self.cwd = step.argument
            self.path("").mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY":
            sources, target = copies(step, self.context)
            for source in sources:
                self._copy(source, self.path(target), is_folder=target.endswith("/"))
        elif step.name == "RUN" and not step.is_of_the_system:
            environment = {**os.environ, **self.env, "PATH": f"{self.root}/venv/bin:{os.environ['PATH']}"}
            environment.pop("PYTHONPATH", None)
            subprocess.run(["sh", "-c", step.argument], cwd=self.path(""), env=environment, check=True)

    @staticmethod
    def _copy(source: Path, target: Path, is_folder: bool) -> None:
        """As COPY does: of a folder its content, a file under its name in what ends with a slash."""
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            return
        target = target / source.name if is_folder else target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="image-steps-") as temporary:
        folder = Folder(Path(sys.argv[1] if len(sys.argv) > 1 else temporary).absolute())
        venv.create(folder.root / "venv", with_pip=True)
        print(f"Python {platform.python_version()} for {steps(DOCKERFILE.read_text())[0].argument}")
        for step in steps(DOCKERFILE.read_text()):
            start = time.monotonic()
            folder.do(step)
            left_out = ", left out: it is the system's" if step.is_of_the_system else ""
            print(f"{step.name} {step.argument}: {time.monotonic() - start:.0f} s{left_out}", flush=True)


if __name__ == "__main__":
    main()
