"""Python runs this at start when this folder is on PYTHONPATH: the way into a ComfyUI server that we only launch."""

import torch_shims

torch_shims.install()
