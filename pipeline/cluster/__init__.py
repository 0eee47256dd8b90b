"""Extraction on a Ray cluster: of this machine's devices, or of several machines."""
