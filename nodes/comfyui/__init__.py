"""Everything that touches ComfyUI's internals: folders, feedback, cache, a MODEL's patches and branches, sampling,
gradients.

A change in ComfyUI should touch these files of ours and no others.
"""
