"""The bundled demonstration model, its questions, and the program that trains it."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The bundled model: a Hugging Face directory with bf16 weights, processor and chat template."""
