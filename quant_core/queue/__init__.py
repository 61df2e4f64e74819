"""A batch of ComfyUI jobs: an API-format workflow, a grid of values, one or several servers. No torch but to merge."""
