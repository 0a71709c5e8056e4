"""Robust fine-tuning of a small CLIP on emoji in six drawing styles: `python -m examples.emoji.run`."""
