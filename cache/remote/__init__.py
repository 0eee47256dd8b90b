"""Stores behind URLs: places, requests, retries, and the folder that keeps their shards."""
