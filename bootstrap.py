#!/usr/bin/env python3
"""From a fresh checkout to a result in one command; needs only Python 3.10 or newer.

    python bootstrap.py demo [arguments of `calibquant demo`]
    python bootstrap.py test [arguments of pytest]

Makes `.venv` beside this file and installs what the command needs, once: a stamp in `.venv` makes later runs quick.
`demo` works without a ComfyUI: a small sampler of its own draws then. On a terminal it offers to bring ComfyUI
(--comfyui: yes, --no-comfyui: no, neither asked again): one shallow clone of a release into `.comfyui`.
With a second, newer ComfyUI at hand (COMFYUI_PATH_NEW, or beside the first with "-next" after its name) `test` makes
`.venv-next` for it and runs there, after all tests with the first, those that a core can change.
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
from dataclasses import dataclass
from pathlib import Path

from quant_core.locate import BROUGHT, ROOT, find_comfyui, find_newer_comfyui

NEWER = ROOT / ".venv-next"
SHIMS = ROOT / "tests" / "shims"  # see torch_shims.py there
CPU_TORCH = "torch==2.13.0+cpu"
CPU_INDEX = ("--index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1", "--timeout", "30")
# Peers that the parity tests compare with; their dependencies would replace the CPU build of torch.
PEERS = ("convert-to-quant==1.3.4", "prodigy-plus-schedule-free")
# ComfyUI requirements that follow torch's build, installed after it and with care.
VISION = ("torchvision", "torchaudio")
NO_DEPS = ("spandrel", "kornia")
NO_DEPS_NEED = ("kornia-rs",)  # what those two need besides what ComfyUI already brings

# The newest release that the tests have run with.
COMFYUI_URL, COMFYUI_TAG = "https://github.com/comfyanonymous/ComfyUI.git", "v0.33.0"
CLONING = 600  # seconds at most; a line that stalls for 20 ends it sooner
STALLED = ("-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=20")

COMMANDS = {  # command: (extra to install, arguments of the virtual environment's python)
    "demo": ("metrics", ["-m", "quant_core.cli", "demo"]),
    # Two workers, a file of tests each at a time: files share a ComfyUI server, and few machines have room for many.
    "test": ("test,metrics", ["-m", "pytest", "-n", "2", "--dist", "loadfile"]),
}
ON_A_NEWER_CORE = ["-m", "core and not wide"]  # pytest: the tests that another core can change, but the long ones
INTERRUPTED, NO_TESTS = 2, 5  # exit codes of pytest


class SetupError(Exception):
    """Set-up cannot go on; the message is one line with the remedy."""


def say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the ComfyUI whose requirements it holds."""

    folder: Path
    comfyui: Path | None

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def needs_shims(self) -> Path:
        """Exists where torchvision or torchaudio does not import by itself."""
        return self.folder / "needs-shims"

    def runs(self, code: str) -> bool:
        return subprocess.run([str(self.python), "-c", code], capture_output=True).returncode == 0

    def pip(self, *arguments: str, quiet_failure: bool = False) -> bool:
        """pip install; with ``quiet_failure`` False instead of a SetupError."""
        command = [str(self.python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=quiet_failure, stdout=None if quiet_failure else sys.stderr)
        if done.returncode and not quiet_failure:
            raise SetupError("pip failed for the reason above; mend that and run the same command again")
        return done.returncode == 0

    def torch_version(self) -> str:
        code = "import importlib.metadata as m; print(m.version('torch'))"
        return subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def has_nvidia() -> bool:
    """Whether an NVIDIA driver answers (nvidia-smi alone also exists in images on machines without a GPU)."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def wants_cpu_torch() -> bool:
    # macOS and Windows: the index's own torch has no CUDA. Linux: it is the CUDA build, several GB.
    return sys.platform.startswith("linux") and not has_nvidia()


def make_venv(into: Environment) -> None:
    if into.python.exists() and into.runs("import pip"):
        return
    say(f"making {into.folder.name} with Python {sys.version.split()[0]}")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(into.folder)], stdout=sys.stderr).returncode:
        raise SetupError("python -m venv failed; on Debian and Ubuntu: apt install python3-venv")


def install_torch(into: Environment) -> None:
    if into.runs("import torch"):
        return
    if not wants_cpu_torch():
        say("installing torch")
        into.pip("torch")
        return
    say("installing torch (CPU build: no NVIDIA GPU found)")
    # The first finds a wheel in a folder that pip is configured with; where there is none, it fails at once.
    if not into.pip(CPU_TORCH, quiet_failure=True):
        into.pip("torch", *CPU_INDEX)


def pin_torch(into: Environment) -> list[str]:
    """pip arguments that forbid every later install to replace torch."""
    pins = into.folder / "torch-pin.txt"
    pins.write_text(f"torch=={into.torch_version()}\n", encoding="utf-8")
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


def install_vision(into: Environment, pin: list[str]) -> None:
    """torchvision and torchaudio that fit the installed torch."""
    if wants_cpu_torch():
        if into.pip(*VISION, *pin, *CPU_INDEX, quiet_failure=True):
            return
        say("no CPU builds of torchvision and torchaudio within reach: the index's will do, their compiled parts idle")
    minor = int(into.torch_version().split(".")[1])
    if not into.pip(f"torchvision==0.{minor + 15}.*", "--no-deps", quiet_failure=True):  # torch 2.N: 0.(N+15)
        into.pip("torchvision", "--no-deps")
    into.pip("torchaudio", "--no-deps")


def install_all(into: Environment, extras: str) -> None:
    make_venv(into)
    install_torch(into)
    pin = pin_torch(into)
    plain, without_deps = comfyui_requirements(into.comfyui) if into.comfyui else ([], [])
    of_comfyui = f" and the requirements of ComfyUI at {into.comfyui}" if into.comfyui else ""
    say(f"installing calibquant[{extras}]{of_comfyui}")
    into.pip(*pin, "--editable", f"{ROOT}[{extras}]", *plain)
    if into.comfyui:
        install_vision(into, pin)
        into.pip("--no-deps", *without_deps, *NO_DEPS_NEED)
        into.needs_shims.unlink(missing_ok=True)
        if not into.runs("import torchvision, torchaudio"):
            into.needs_shims.touch()
    if "test" in extras.split(","):
        into.pip("--no-deps", *PEERS)


def fingerprint(comfyui: Path | None) -> str:
    parts = [sys.version, str(ROOT), str(wants_cpu_torch()), str(comfyui)]
    files = [Path(__file__), ROOT / "pyproject.toml"] + ([comfyui / "requirements.txt"] if comfyui else [])
    content = "\0".join(parts + [file.read_text(encoding="utf-8") for file in files])
    return hashlib.sha256(content.encode()).hexdigest()


def ensure_installed(into: Environment, command: str) -> None:
    extras, _ = COMMANDS[command]
    wanted = fingerprint(into.comfyui)
    # What `test` installs includes the rest.
    stamps = [into.folder / f"bootstrap-{name}.stamp" for name in (command, "test")]
    if into.python.exists() and any(s.is_file() and s.read_text(encoding="utf-8") == wanted for s in stamps):
        return
    install_all(into, extras)
    stamps[0].write_text(wanted, encoding="utf-8")


def wants_comfyui(arguments: list[str]) -> bool:
    """Whether to bring a ComfyUI: as the arguments say, else as a person at the terminal says; never unasked."""
    if "--no-comfyui" in arguments or "--comfyui" in arguments:
        return "--comfyui" in arguments
    if not (sys.stdin.isatty() and sys.stderr.isatty()) or os.environ.get("CI"):
        say("no ComfyUI found: a small built-in sampler draws (--comfyui brings one)")
        return False
    say(f"no ComfyUI found. Bring {COMFYUI_TAG} to draw with (1 GB with its packages, minutes)?")
    say("without it a small built-in sampler draws the same pictures, and the demo starts at once")
    print("bootstrap: bring ComfyUI? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def bring_comfyui(url: str = COMFYUI_URL, tag: str = COMFYUI_TAG, into: Path = BROUGHT) -> Path | None:
    """Clone a release; None, with one line that says why, where that fails. Half a clone never has the final name."""
    say(f"bringing ComfyUI {tag} from {url} into {into.name}")
    part = into.with_name(into.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    command = ["git", *STALLED, "clone", "--quiet", "--depth", "1", "--branch", tag, url, str(part)]
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            command, env=quiet, timeout=CLONING, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if done.returncode == 0 and (part / "main.py").is_file():
            shutil.rmtree(into, ignore_errors=True)
            part.rename(into)
            return into
        why = (done.stderr.strip().splitlines() or ["it holds no main.py"])[-1]
    except FileNotFoundError:
        why = "git is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"no ComfyUI brought ({why}): the built-in sampler draws")
    return None


def demo(comfyui: Path | None, arguments: list[str]) -> int:
    if "--no-comfyui" in arguments:
        comfyui = None
    elif comfyui is None and wants_comfyui(arguments):
        comfyui = bring_comfyui()
    arguments = [argument for argument in arguments if argument != "--comfyui"]  # the rest is `calibquant demo`'s
    where = Environment(ROOT / ".venv", comfyui)
    if comfyui == BROUGHT:
        try:
            ensure_installed(where, "demo")
        except SetupError as error:
            say(f"the ComfyUI in {BROUGHT.name} is left out ({error})")
            where, arguments = Environment(where.folder, None), [*arguments, "--no-comfyui"]
    return run("demo", where, arguments)


def run(command: str, where: Environment, arguments: list[str]) -> int:
    """Install what the command needs and run it there; its exit code."""
    ensure_installed(where, command)
    variables = dict(os.environ)
    if command == "test":
        variables.setdefault("OMP_NUM_THREADS", "1")  # or the workers' threads stand in each other's way
    if where.comfyui:
        variables["COMFYUI_PATH"] = str(where.comfyui)
        # The tests look after this themselves; the demo starts ComfyUI code in processes of its own.
        if command == "demo" and where.needs_shims.exists():
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SHIMS), variables.get("PYTHONPATH")]))
    cwd = ROOT if command == "test" else None  # the demo's --out is relative to where the user stands
    return subprocess.run([str(where.python), *COMMANDS[command][1], *arguments], env=variables, cwd=cwd).returncode


def run_on_newer_core(arguments: list[str]) -> int:
    newer = find_newer_comfyui()
    if newer is None:
        say("no second, newer ComfyUI found (COMFYUI_PATH_NEW=folder names one): tested with one core")
        return 0
    say(f"once more with ComfyUI at {newer}: the tests that a core can change")
    code = run("test", Environment(NEWER, newer), [*ON_A_NEWER_CORE, *arguments])
    return 0 if code == NO_TESTS else code


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
        if command == "demo":
            return demo(comfyui, rest)
        if comfyui is None:
            say("no ComfyUI found, so what needs one is left out (COMFYUI_PATH=folder names one)")
        code = run(command, Environment(ROOT / ".venv", comfyui), rest)
        if code != INTERRUPTED:
            code = run_on_newer_core(rest) or code
        return code
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
