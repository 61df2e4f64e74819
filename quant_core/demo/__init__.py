"""The whole job on the small model that ships with the pack."""
