"""The engine of ComfyUI-CalibQuant: works without ComfyUI, from a notebook, the command line or the nodes.

Data flows one way: ``checkpoint`` (files) -> ``source`` (a model, its family and layers) -> ``plan`` (what is
decided; ``recipes`` make one) -> ``layout`` (the output file, to the byte) -> ``pack`` (rounding, ``formats``) ->
``pipeline`` (the job) -> ``quality`` (what it cost).
"""

__version__ = "0.1.0"
