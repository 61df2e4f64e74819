"""How one weight is rounded: to nearest, with searched scales, or by GPTQ (``gptq``).

On the CPU chunk by chunk in several threads; on a GPU nearest rounding is comfy-kitchen's kernels. Where a GPU's memory
is short (``room``) a weight stays on the host and goes there in ``parts`` of its rows. Formats know how to round; this
module knows what to ask of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import CalibQuantError
from ..files.text import counted
from ..formats import Codes, FileTensors, Format, Frame, join, turn
from . import gptq, hswq
from .parallel import Each, workers
from .room import CPU

# Elements per chunk: float32 temporaries then stay in the second-level cache (3x faster than a whole tensor).
CHUNK = 1 << 19
SEARCHED = 1 << 16  # elements whose scales are searched at once: the search keeps float32 of them in the cache
ROWS = 1024  # rows checked at once when nothing is rounded
LARGEST = 2.0**120  # of weights: scales round up and GPTQ's feedback adds to them, and float32 ends at 2**128
SAFE = 1e-20  # a float32 sum of squares above it has lost none that matter to underflow


@dataclass(frozen=True)
class Packed:
    """The tensors of one layer as the file wants them, and what rounding cost.

    error = ||W - Q||^2 and energy = ||W||^2, so error / energy is the relative error of the weights.
    """

    tensors: FileTensors
    error: float
    energy: float


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda -> a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise CalibQuantError("--device cuda: this torch sees no CUDA GPU: use --device cpu or install a CUDA torch")
    return torch.device(name)


def nearest(
    weight: torch.Tensor,
    fmt: Format,
    device: torch.device,
    where: str,
    scale: torch.Tensor | None = None,
    parts: int = 1,
) -> Packed:
    """Round ``[out, ...]`` (any float dtype) to nearest in ``fmt``.

    scale: a per-tensor scale (float32 scalar) chosen elsewhere, instead of the format's own rule.
    ``where`` ("FILE: layer L") begins the message of the CalibQuantError raised for a NaN or Inf weight.
    """
    with workers(device) as each:
        flat = own_basis(weight.reshape(weight.shape[0], -1), fmt, each).to(_held(device, parts))
        rows = _part_rows(flat, fmt, parts) if parts > 1 or device.type != "cpu" else _chunk_rows(weight, fmt)
        amax, energy = _scan(weight, flat, rows, where, each)
        scale = _moved(fmt.tensor(flat, amax) if scale is None else scale, device)
        if device.type == "cpu" or parts > 1:
            tensors, error = _by_chunks(flat, fmt, scale, rows, device, each)
        else:
            tensors, error = _by_kernel(flat, fmt, scale)
    if weight.dim() != 2:  # Conv weights are rounded as matrices and stored in their own shape
        tensors["weight"] = tensors["weight"].view(weight.shape)
    return Packed({name: tensor.cpu() for name, tensor in tensors.items()}, error, energy)


def searched(
    weight: torch.Tensor,
    fmt: Format,
    device: torch.device,
    where: str,
    importance: torch.Tensor | None = None,
    tensor: torch.Tensor | None = None,
    parts: int = 1,
) -> Packed:
    """Scales chosen by the least sum of importance * (q - w)**2 instead of by the largest weight.

    weight: [out, in]; importance: float32 [in], E[x^2] in the format's own basis, or None for the plain squared error.
    tensor: ``Frame.tensor`` of the whole that ``weight`` is a part of.
    """
    per_column = (torch.ones(weight.shape[1]) if importance is None else importance).to(device)

    def search(chunk: torch.Tensor) -> tuple[Codes, float]:
        chunk, group = chunk.to(device).float(), fmt.group or chunk.shape[1]
        frame = fmt.frame(chunk, tensor)
        chosen = fmt.choose(chunk.view(len(chunk), -1, group), frame, per_column.view(-1, group))
        codes = Codes(fmt.codes(chunk, chosen, frame), chosen, frame)
        return codes, squared_distance(chunk, fmt.dequantize(codes, tuple(chunk.shape)))

    with workers(device) as each:
        flat, rows = own_basis(weight.to(_held(device, parts)), fmt, each), _chunk_rows(weight, fmt)
        amax, energy = _scan(weight, flat, rows, where, each)
        tensor = _moved(_tensor_scale(flat, fmt, amax, per_column, rows, each) if tensor is None else tensor, device)
        at_once = max(1, min(SEARCHED // flat.shape[1], _part_rows(flat, fmt, parts)))
        found, errors = zip(*each(search, flat.split(at_once)), strict=True)
        return _packed(fmt, join(found), sum(errors), energy)


def shared_scale(
    weight: torch.Tensor,
    fmt: Format,
    device: torch.device,
    where: str,
    importance: torch.Tensor | None = None,
    parts: int = 1,
) -> torch.Tensor | None:
    """``Frame.tensor`` of a whole weight [out, in], for those who round a part of it: by the nearest rule, or, given
    the importance of columns, the searched one.
    """
    with workers(device) as each:
        flat, rows = own_basis(weight.to(_held(device, parts)), fmt, each), _chunk_rows(weight, fmt)
        amax, _ = _scan(weight, flat, rows, where, each)
        if importance is None:
            return fmt.tensor(flat, amax)
        return _tensor_scale(flat, fmt, amax, importance.to(device), rows, each)


def own_basis(weight: torch.Tensor, fmt: Format, each: Each) -> torch.Tensor:
    return turn(weight, fmt.rotation(weight.shape[1]), each)


def _held(device: torch.device, parts: int) -> torch.device:
    """Where the whole weight lies while its parts are rounded on the device."""
    return device if parts == 1 else CPU


def _moved(scale: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if scale is None else scale.to(device)


def _part_rows(flat: torch.Tensor, fmt: Format, parts: int) -> int:
    return -(-len(flat) // (parts * fmt.rows)) * fmt.rows


def _chunk_rows(weight: torch.Tensor, fmt: Format) -> int:
    return max(1, CHUNK * weight.shape[0] // weight.numel() // fmt.rows) * fmt.rows


def _tensor_scale(
    flat: torch.Tensor, fmt: Format, amax: torch.Tensor, importance: torch.Tensor, rows: int, each: Each
) -> torch.Tensor | None:
    """The format's own ``Frame.tensor``, or a searched scale where the tensor's scale is all there is."""
    own = fmt.tensor(flat, amax)
    if fmt.group or own is None or fmt.config(tuple(flat.shape)) is None or amax == 0:
        return own
    best, _ = hswq.search(hswq.histogram(flat.cpu(), importance.cpu()))
    found, own = torch.tensor(best / hswq.TOP, device=importance.device), own.to(importance.device)

    def cost(scale: torch.Tensor) -> float:
        grid = fmt.grid(None, Frame(scale))

        def part(chunk: torch.Tensor) -> float:
            chunk = chunk.to(importance.device).float()
            return ((grid.snap(chunk) - chunk).square() @ importance).sum().item()

        return sum(each(part, flat.split(rows)))

    # The histogram is exact for 16-bit weights only; of float32 ones (a baked LoRA) it keeps ten mantissa bits.
    return found if cost(found) < cost(own) else own


def by_gptq(
    weight: torch.Tensor,
    fmt: Format,
    device: torch.device,
    where: str,
    inputs: gptq.Factor,
    tensor: torch.Tensor | None = None,
    parts: int = 1,
) -> Packed:
    """Error feedback over the columns (``gptq.quantize``). weight: [out, in].

    inputs: of rows in the format's own basis, on ``device``; tensor: ``Frame.tensor`` of the whole that ``weight`` is
    a part of.
    """
    with workers(device) as each:
        flat = own_basis(weight.to(_held(device, parts), torch.float32), fmt, each)
        amax, energy = _scan(weight, flat, CHUNK // flat.shape[1] + 1, where, each)
        tensor = _moved(fmt.tensor(flat, amax) if tensor is None else tensor, device)
    found, error = [], 0.0
    for part in flat.split(_part_rows(flat, fmt, parts)):
        wanted = part.to(device)
        found.append(gptq.quantize(wanted, fmt, tensor, inputs))
        error += squared_distance(wanted, fmt.dequantize(found[-1], tuple(wanted.shape)))
    return _packed(fmt, join(found), error, energy)


def _packed(fmt: Format, codes: Codes, error: float, energy: float) -> Packed:
    return Packed({name: tensor.cpu() for name, tensor in fmt.pack(codes).items()}, error, energy)


def _scan(weight: torch.Tensor, flat: torch.Tensor, rows: int, where: str, each: Each) -> tuple[torch.Tensor, float]:
    """max|w| (float32 scalar) and ||w||^2 of ``flat``, with the check that every weight is finite and can be rounded.

    ``flat`` is ``weight`` in a format's own basis, where one bad value has spoiled a whole block.
    """

    def scan(chunk: torch.Tensor) -> tuple[torch.Tensor, float]:
        chunk = chunk.float()
        return chunk.abs().amax(), squared_norm(chunk)

    largest, energies = zip(*each(scan, flat.split(rows)), strict=True)
    amax = torch.stack(largest).amax()  # NaN wins in both
    if not amax <= LARGEST:
        refuse_damaged(weight, where)
        raise CalibQuantError(
            f"{where}: weights up to {weight.float().abs().amax():.2g} are too large to be quantized: keep it in bf16"
        )
    return amax, sum(energies)


def refuse_damaged(tensor: torch.Tensor, where: str, what: str = "weight") -> None:
    """CalibQuantError for a weight or bias with NaN or Inf values that is not rounded, only copied or corrected."""
    chunks = [chunk for chunk in tensor.split(ROWS) if chunk.numel()]
    with workers(tensor.device) as each:
        if not all(each(lambda chunk: bool(torch.isfinite(chunk.float().abs().amax())), chunks)):
            raise CalibQuantError(_damaged(tensor, where, what))


def _damaged(tensor: torch.Tensor, where: str, what: str = "weight") -> str:
    bad = (~torch.isfinite(tensor)).sum().item()
    kind = " and ".join(name for name, is_so in (("NaN", torch.isnan), ("Inf", torch.isinf)) if is_so(tensor).any())
    return f"{where}: the {what} has {counted(bad, f'{kind} value')}: the source file is damaged"


def _by_chunks(
    flat: torch.Tensor, fmt: Format, tensor: torch.Tensor | None, rows: int, device: torch.device, each: Each
) -> tuple[FileTensors, float]:
    def quantize(chunk: torch.Tensor) -> tuple[Codes, float]:
        chunk = chunk.to(device).float()
        codes = fmt.quantize(chunk, tensor)
        return codes, squared_distance(chunk, fmt.dequantize(codes, tuple(chunk.shape)))

    parts, errors = zip(*each(quantize, flat.split(rows)), strict=True)
    return fmt.pack(join(parts)), sum(errors)


def _by_kernel(flat: torch.Tensor, fmt: Format, tensor: torch.Tensor | None) -> tuple[FileTensors, float]:
    flat = flat.float()
    tensors = fmt.kernel(flat, tensor)
    decoded = turn(fmt.decode(tensors, tuple(flat.shape)), fmt.rotation(flat.shape[1]))
    return tensors, squared_distance(flat, decoded)


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b||^2."""
    return squared_norm(a - b)


def squared_norm(x: torch.Tensor) -> float:
    """||x||^2 of a float32 tensor. BLAS: six times faster than a float64 sum, 1e-6 off on a chunk."""
    flat = x.reshape(-1)
    fast = torch.dot(flat, flat).item()
    if SAFE < fast < math.inf:
        return fast
    return torch.dot(flat.double(), flat.double()).item()  # of zeros, or squares that float32 does not hold
