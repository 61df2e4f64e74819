"""A real ComfyUI for the tests: imported into this process, or run as a server.

    comfyui = import_comfy(base_dir)         # then `import comfy.sd, nodes, folder_paths` are ComfyUI's
    with start_server(base_dir) as server:   # models go to server.base_dir / "models", results to … / "output"
        entry = server.post({"1": {"class_type": "UNETLoader", "inputs": {...}}})

`base_dir` takes the place of ComfyUI's own models, input, output, temp and user folders: its checkout stays untouched.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bootstrap import ROOT, SHIMS, find_comfyui

__all__ = [
    "PACK_NAME",
    "ROOT",
    "ComfyUINotFound",
    "PromptInterrupted",
    "Server",
    "ServerError",
    "find_comfyui",
    "import_comfy",
    "start_server",
]

PACK_NAME = "ComfyUI-CalibQuant"
MODEL_FOLDERS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae")
START_SECONDS = 180  # 10 s on a quiet machine, the rest for a busy one
LOG_TAIL_LINES = 40


class ComfyUINotFound(Exception):  # noqa: N818 - a state of the machine, not a fault
    """There is no ComfyUI on this machine."""


class ServerError(Exception):
    """The server did not start, refused a prompt or failed in it; the message holds its reasons and its log's end."""


class PromptInterrupted(ServerError):  # noqa: N818 - asked for, not a fault
    """The prompt was stopped by an interrupt."""


def require_comfyui() -> Path:
    comfyui = find_comfyui()
    if comfyui is None:
        raise ComfyUINotFound("ComfyUI not found: set COMFYUI_PATH")
    return comfyui


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def install_shims() -> list[str]:
    """Make torchvision and torchaudio importable here; the names that needed help (none on a normal install)."""
    if str(SHIMS) not in sys.path:
        sys.path.append(str(SHIMS))
    return importlib.import_module("torch_shims").install()


# --- in this process


def import_comfy(base_dir: Path | None = None) -> Path:
    """Make ComfyUI importable in this process and return its folder; `base_dir` takes its models and outputs.

    Raises ComfyUINotFound. The first call decides about `base_dir`: ComfyUI reads it once, at import.
    """
    comfyui = require_comfyui()
    _put_first(comfyui)
    install_shims()
    from comfy.cli_args import args  # before any other import of ComfyUI: device and folders are chosen from it

    args.cpu = args.cpu or not has_cuda()
    if base_dir is not None and "folder_paths" not in sys.modules:
        make_base_dir(base_dir)
        args.base_directory = str(base_dir)
        _register_output_models()
    return comfyui


def _put_first(comfyui: Path) -> None:
    """ComfyUI wins the names it shares with this repository: `nodes` above all."""
    sys.path[:] = [str(comfyui), *(p for p in sys.path if p != str(comfyui))]
    for name in [n for n in sys.modules if n == "nodes" or n.startswith("nodes.")]:
        if not str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(comfyui)):
            del sys.modules[name]
    importlib.invalidate_caches()


def _register_output_models() -> None:
    # As ComfyUI's start does: what a node saves under output/diffusion_models can be chosen in UNETLoader.
    import folder_paths

    for name in ("checkpoints", "clip", "diffusion_models", "loras", "vae"):
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.get_output_directory(), name))


# --- as a server


class Server:
    """A running ComfyUI server, spoken to over HTTP."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, base_dir: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.base_dir = base_dir
        self.output_dir = base_dir / "output"
        self.log_path = base_dir / "server.log"
        self.start_seconds = 0.0

    def get(self, path: str) -> Any:
        """GET `path` (begins with /); the parsed JSON. Raises urllib.error.HTTPError."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format prompt; its id. Raises ServerError with the node errors when it is refused."""
        try:
            return self._post("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ServerError(f"prompt refused ({error.code}): {error.read().decode()}\n{self.log_tail()}") from None

    def wait(self, prompt_id: str, timeout: float = 300.0) -> dict[str, Any]:
        """The history entry of a finished prompt. Raises PromptInterrupted, or ServerError if it failed."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return self._succeeded(entry)
            time.sleep(0.05)
        raise ServerError(f"prompt did not finish within {timeout} s, or the server died\n{self.log_tail()}")

    def post(self, prompt: dict[str, Any], timeout: float = 300.0) -> dict[str, Any]:
        """Queue a prompt and wait for it; its history entry, node texts and files under ["outputs"][node id]."""
        return self.wait(self.submit(prompt), timeout)

    def interrupt(self) -> None:
        """Ask the running prompt to stop."""
        self._post("/interrupt", {})

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        log = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["--- end of the server log", *log[-lines:]])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read() or b"null")

    def _succeeded(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["status"]["status_str"] == "success":
            return entry
        messages = dict(entry["status"]["messages"])
        if "execution_interrupted" in messages:
            raise PromptInterrupted("prompt interrupted")
        failure = messages.get("execution_error", {})
        what = f"node {failure.get('node_id')} ({failure.get('node_type')}): {failure.get('exception_message')}"
        raise ServerError(f"{what}\n{''.join(failure.get('traceback', []))}\n{self.log_tail()}")


@contextlib.contextmanager
def start_server(base_dir: Path, port: int = 0, custom_node: Path = ROOT) -> Iterator[Server]:
    """Run ComfyUI with `base_dir` as its folders and `custom_node` as its only pack; port 0 takes a free one.

    Raises ComfyUINotFound, or ServerError with the log's end if it does not come up.
    """
    comfyui = require_comfyui()
    make_base_dir(base_dir)
    _place_pack(custom_node, base_dir / "custom_nodes" / PACK_NAME)
    port = port or _free_port()
    command = [
        sys.executable,
        str(comfyui / "main.py"),
        "--listen",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-api-nodes",
        "--base-directory",
        str(base_dir),
        "--database-url",
        "sqlite:///:memory:",
        *([] if has_cuda() else ["--cpu"]),
    ]
    environment = dict(os.environ)
    if install_shims():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SHIMS), environment.get("PYTHONPATH")]))
    started = time.monotonic()
    with open(base_dir / "server.log", "wb") as log:
        # cwd: ComfyUI writes a log file where it stands. A group of its own: its children go down with it.
        process = subprocess.Popen(
            command,
            cwd=base_dir,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=os.name != "nt",
        )
    try:
        server = Server(process, port, base_dir)
        _wait_until_up(server)
        server.start_seconds = time.monotonic() - started
        yield server
    finally:
        _stop(process)


def make_base_dir(base_dir: Path) -> None:
    for name in ("custom_nodes", "input", "output", "temp", "user", *(f"models/{m}" for m in MODEL_FOLDERS)):
        (base_dir / name).mkdir(parents=True, exist_ok=True)


def _place_pack(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_up(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError):  # URLError is one
            server.get("/system_stats")
            return
        time.sleep(0.1)
    raise ServerError(f"ComfyUI did not answer on {server.url}\n{server.log_tail()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
        process.wait(10)
        return
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
