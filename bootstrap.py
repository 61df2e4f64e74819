#!/usr/bin/env python3
"""From a fresh checkout to a result in one command; needs only Python 3.10 or newer.

    python bootstrap.py demo [arguments of `calibquant demo`]
    python bootstrap.py test [arguments of pytest]

Makes `.venv` beside this file and installs what the command needs, once: a stamp in `.venv` makes later runs quick.
A Linux machine without an NVIDIA GPU gets the CPU build of torch, never the CUDA one. With a ComfyUI present
(COMFYUI_PATH, the one whose custom_nodes holds this checkout, or ~/comfy/ComfyUI) its requirements come along.
Plain standard library, the same steps on Linux, macOS and Windows.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from quant_core.locate import ROOT, find_comfyui

VENV = ROOT / ".venv"
SHIMS = ROOT / "tests" / "shims"  # see torch_shims.py there
NEEDS_SHIMS = VENV / "needs-shims"  # exists where torchvision or torchaudio does not import by itself
CPU_TORCH = "torch==2.13.0+cpu"
CPU_INDEX = ("--index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1", "--timeout", "30")
# Peers that the parity tests compare with; their dependencies would replace the CPU build of torch.
PEERS = ("convert-to-quant==1.3.4", "prodigy-plus-schedule-free")
# ComfyUI requirements that follow torch's build, installed after it and with care.
VISION = ("torchvision", "torchaudio")
NO_DEPS = ("spandrel", "kornia")
NO_DEPS_NEED = ("kornia-rs",)  # what those two need besides what ComfyUI already brings

COMMANDS = {  # command: (extra to install, arguments of the virtual environment's python)
    "demo": ("metrics", ["-m", "quant_core.cli", "demo"]),
    "test": ("test,metrics", ["-m", "pytest"]),
}


class SetupError(Exception):
    """Set-up cannot go on; the message is one line with the remedy."""


def say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def has_nvidia() -> bool:
    """Whether an NVIDIA driver answers (nvidia-smi alone also exists in images on machines without a GPU)."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def wants_cpu_torch() -> bool:
    # macOS and Windows: the index's own torch has no CUDA. Linux: it is the CUDA build, several GB.
    return sys.platform.startswith("linux") and not has_nvidia()


def runs(*code: str) -> bool:
    return subprocess.run([str(venv_python()), "-c", *code], capture_output=True).returncode == 0


def pip(*arguments: str, quiet_failure: bool = False) -> bool:
    """pip install in the virtual environment; with ``quiet_failure`` False instead of a SetupError."""
    command = [str(venv_python()), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=quiet_failure, stdout=None if quiet_failure else sys.stderr)
    if done.returncode and not quiet_failure:
        raise SetupError("pip failed for the reason above; mend that and run the same command again")
    return done.returncode == 0


def make_venv() -> None:
    if venv_python().exists() and runs("import pip"):
        return
    say(f"making {VENV.name} with Python {sys.version.split()[0]}")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], stdout=sys.stderr).returncode:
        raise SetupError("python -m venv failed; on Debian and Ubuntu: apt install python3-venv")


def install_torch() -> None:
    if runs("import torch"):
        return
    if not wants_cpu_torch():
        say("installing torch")
        pip("torch")
        return
    say("installing torch (CPU build: no NVIDIA GPU found)")
    # The first finds a wheel in a folder that pip is configured with; where there is none, it fails at once.
    if not pip(CPU_TORCH, quiet_failure=True):
        pip("torch", *CPU_INDEX)


def torch_version() -> str:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run([str(venv_python()), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def pin_torch() -> list[str]:
    """pip arguments that forbid every later install to replace torch."""
    pins = VENV / "torch-pin.txt"
    pins.write_text(f"torch=={torch_version()}\n", encoding="utf-8")
    return ["--constraint", str(pins)]


def requirement_name(line: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", line.strip())
    return found.group().lower().replace("_", "-") if found else ""


def comfyui_requirements(comfyui: Path) -> tuple[list[str], list[str]]:
    """ComfyUI's requirement lines: (installed as they are, installed without dependencies)."""
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = [line.split("#")[0].strip() for line in lines if requirement_name(line)]
    plain = [line for line in named if requirement_name(line) not in ("torch", *VISION, *NO_DEPS)]
    return plain, [line for line in named if requirement_name(line) in NO_DEPS]


def install_vision(pin: list[str]) -> None:
    """torchvision and torchaudio that fit the installed torch."""
    if wants_cpu_torch():
        if pip(*VISION, *pin, *CPU_INDEX, quiet_failure=True):
            return
        say("no CPU builds of torchvision and torchaudio within reach: the index's will do, their compiled parts idle")
    minor = int(torch_version().split(".")[1])
    if not pip(f"torchvision==0.{minor + 15}.*", "--no-deps", quiet_failure=True):  # torch 2.N goes with 0.(N+15)
        pip("torchvision", "--no-deps")
    pip("torchaudio", "--no-deps")


def install_all(extras: str, comfyui: Path | None) -> None:
    make_venv()
    install_torch()
    pin = pin_torch()
    plain, without_deps = comfyui_requirements(comfyui) if comfyui else ([], [])
    say(f"installing calibquant[{extras}]" + (f" and the requirements of ComfyUI at {comfyui}" if comfyui else ""))
    pip(*pin, "--editable", f"{ROOT}[{extras}]", *plain)
    if comfyui:
        install_vision(pin)
        pip("--no-deps", *without_deps, *NO_DEPS_NEED)
        NEEDS_SHIMS.unlink(missing_ok=True)
        if not runs("import torchvision, torchaudio"):
            NEEDS_SHIMS.touch()
    if "test" in extras.split(","):
        pip("--no-deps", *PEERS)


def fingerprint(comfyui: Path | None) -> str:
    parts = [sys.version, str(ROOT), str(wants_cpu_torch()), str(comfyui)]
    files = [Path(__file__), ROOT / "pyproject.toml"] + ([comfyui / "requirements.txt"] if comfyui else [])
    content = "\0".join(parts + [file.read_text(encoding="utf-8") for file in files])
    return hashlib.sha256(content.encode()).hexdigest()


def ensure_installed(command: str, comfyui: Path | None) -> None:
    extras, _ = COMMANDS[command]
    wanted = fingerprint(comfyui)
    stamps = [VENV / f"bootstrap-{name}.stamp" for name in (command, "test")]  # what `test` installs includes the rest
    if venv_python().exists() and any(s.is_file() and s.read_text(encoding="utf-8") == wanted for s in stamps):
        return
    install_all(extras, comfyui)
    stamps[0].write_text(wanted, encoding="utf-8")


def child_environment(command: str, comfyui: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    if not comfyui:
        return environment
    environment["COMFYUI_PATH"] = str(comfyui)
    # The tests look after this themselves; the demo starts ComfyUI code in processes of its own.
    if command == "demo" and NEEDS_SHIMS.exists():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SHIMS), environment.get("PYTHONPATH")]))
    return environment


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - this file is what meets an old Python first
        print(f"error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 1
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: python bootstrap.py {{{','.join(COMMANDS)}}} [arguments]", file=sys.stderr)
        return 2
    command, rest = arguments[0], arguments[1:]
    try:
        comfyui = find_comfyui()
        if comfyui is None:
            say("no ComfyUI found, so what needs one is left out (COMFYUI_PATH=folder names one)")
        ensure_installed(command, comfyui)
        environment = child_environment(command, comfyui)
        where = ROOT if command == "test" else None  # the demo's --out is relative to where the user stands
        return subprocess.run([str(venv_python()), *COMMANDS[command][1], *rest], env=environment, cwd=where).returncode
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
