"""Evaluation: generation, scores beside their controls, the report."""
