"""Quantize vision-language models to 3- and 4-bit weights with QIG, and serve them with vLLM."""

__version__ = "0.1.0"
