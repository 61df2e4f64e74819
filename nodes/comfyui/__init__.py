"""Everything that touches ComfyUI's internals: folders, feedback, cache, a MODEL's patches, sampling, gradients.

A change in ComfyUI should touch these six files of ours and no others.
"""
