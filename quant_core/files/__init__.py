"""Bytes in and out: safetensors headers, tensors, quantization markers, text."""
