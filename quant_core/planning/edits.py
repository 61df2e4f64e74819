"""Formats that a person sets by hand: layer -> option (``costs.OPTIONS``), over what a strategy decides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..errors import CalibQuantError, OptionError
from ..files.text import parse_json
from ..formats import FORMATS, title
from ..models.source import Source
from ..rounding.layerplan import LayerPlan
from .costs import OPTIONS, RANK, layer_plan
from .plan import Plan
from .recipes import legal, sized

REASON = "set by hand"


def from_json(text: str) -> dict[str, str]:
    """The object of a node's input; "" holds none."""
    if not text.strip():
        return {}
    wanted = '{"LAYER": "FORMAT", …}'
    raw = parse_json(text, "edits are no JSON", f"write {wanted}, or leave them empty")
    if not isinstance(raw, dict) or not all(isinstance(option, str) for option in raw.values()):
        raise OptionError(f"edits are {text.strip()[:40]}…: write {wanted}, or leave them empty")
    return raw


def from_words(source: Source, words: Iterable[str]) -> dict[str, str]:
    """Of "LAYER=FORMAT" each; LAYER is a name, or a regular expression for all that may be quantized; the last wins."""
    found: dict[str, str] = {}
    for word in words:
        pattern, _, option = word.rpartition("=")
        free = (name for name, info in source.layers.items() if not info.protected)
        names = [pattern] if pattern in source.layers else [name for name in free if re.fullmatch(pattern, name)]
        if not names:
            raise CalibQuantError(f"{source.path}: --set {word}: matches no layer that may be quantized: correct it")
        found |= dict.fromkeys(names, option)
    return found


def entry(source: Source, layer: str, option: str) -> LayerPlan:
    """The plan's entry of one layer that is set by hand; CalibQuantError where that cannot be."""
    where = f"{source.path}: layer {layer}"
    if layer not in source.layers:
        raise CalibQuantError(f"{where}: is set by hand, but not in this file: take it out of the edits")
    name, _, rank = option.partition(RANK)
    if name not in OPTIONS or not (rank.isdecimal() if RANK in option else True):
        raise CalibQuantError(f"{where}: unknown format {option!r}: use one of {', '.join(OPTIONS)}")
    info = source.layers[layer]
    if why := info.protected or info.not_linear:
        raise CalibQuantError(f"{where}: cannot be set by hand: {why}: take it out of the edits")
    wish = replace(layer_plan(option), reason=REASON)
    made = legal(wish, info, source.shape(layer))
    if made.format != wish.format:
        why = FORMATS[wish.format].obstacle(source.shape(layer)) or info.detects_shape
        raise CalibQuantError(f"{where}: cannot be {title(wish.format)}: {why}: set another format")
    return made


def applied(source: Source, plan: Plan, fixed: Mapping[str, str]) -> Plan:
    """The plan with these layers as set by hand, and its exact size."""
    made = {layer: entry(source, layer, option) for layer, option in fixed.items()}
    if ranked := [layer for layer, chosen in made.items() if chosen.rank]:
        raise CalibQuantError(
            f"{source.path}: layer {ranked[0]}: branches are set by hand only in plans for a size, bits or an error: "
            "set a format alone"
        )
    return sized(source, replace(plan, layers={**plan.layers, **made})) if made else plan
