"""Chooses questions, generates under four conditions, and scores the texts."""
