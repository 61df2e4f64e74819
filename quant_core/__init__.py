"""The engine of ComfyUI-CalibQuant: works without ComfyUI, from a notebook, the command line or the nodes.

One folder a room; every import points down this list, so a reader may stop where he has seen enough:

    cli, demo      a person asks
    queue          the same workflow on many values and ComfyUI servers
    jobs           quantize, convert, verify, compare
    reports        what came out, as text, tables and JSON
    planning       what is decided for each layer, why, and the output file to the byte
    rounding       which number a weight becomes
    evidence       what is known of weights (probe) and of what layers see (calibration)
    models         a model file: its family, its layers, its weights
    files, formats bytes in and out; one module per storage format
"""

__version__ = "0.1.0"
