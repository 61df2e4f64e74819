"""Make workflows/calibrations/digits.calibration.safetensors: run the shipped API workflow in a real ComfyUI server.

    python benchmarks/calibrate_demo.py [--out FILE]

Needs ComfyUI (see bootstrap.py). Takes seconds. The seeds are the workflow's, none of those that judge a model
(1000 to 1099); the same machine gives the same statistics and rows each time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comfy_env import start_server  # noqa: E402

WORKFLOW = ROOT / "workflows" / "api" / "calibrate_with_prompts.json"
OUT = ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder, start_server(Path(folder)) as server:
        outputs = server.post(json.loads(WORKFLOW.read_text("utf-8")))["outputs"]
        (saved,) = (server.output_dir / "calibrations").glob("*.safetensors")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(saved, out)
    print("\n".join(text for output in outputs.values() for text in output.get("text", [])))
    print(f"{out.name}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
