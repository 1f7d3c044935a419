"""Paired examples: an image and its conditions."""
