"""Stores behind URLs: places, copies, and retries over a network."""
