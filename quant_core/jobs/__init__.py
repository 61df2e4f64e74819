"""The jobs: quantize a source by a plan, convert another dialect, verify and compare a finished file."""

from .comparison import compare
from .concat_lora import concat_loras
from .conversion import convert
from .error_lora import error_lora
from .finished import QuantizedFile
from .quantization import quantize
from .remote import Cluster
from .reuse import find_finished
from .verification import verify

__all__ = [
    "Cluster",
    "QuantizedFile",
    "compare",
    "concat_loras",
    "convert",
    "error_lora",
    "find_finished",
    "quantize",
    "verify",
]
