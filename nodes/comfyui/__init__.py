"""Everything that touches ComfyUI's internals: its folders, its feedback to the user, a MODEL's patches, sampling.

A change in ComfyUI should touch these four files of ours and no others.
"""
