"""A model file: its family, its layers, its weights."""
