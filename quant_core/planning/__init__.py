"""What is decided for each layer and why, and what the file will be, to the byte."""
