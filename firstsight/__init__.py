"""Distil a large egocentric vision-language model into a small one, quantize it, and measure both."""

__version__ = "0.1.0"
