"""Robust fine-tuning of a pre-trained text encoder on the sentiment of one kind of text, tested on three others."""
