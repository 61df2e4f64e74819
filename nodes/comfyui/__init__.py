"""Everything that touches ComfyUI's internals: folders, feedback, cache, a MODEL's patches, sampling.

A change in ComfyUI should touch these five files of ours and no others.
"""
