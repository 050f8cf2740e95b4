"""The frozen model: the door to transformers."""
