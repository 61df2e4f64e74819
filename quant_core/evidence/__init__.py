"""What is known of a model: statistics of its weights, and of what its layers see while it samples."""
