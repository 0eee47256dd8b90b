"""All paths of a workspace, relative to the working directory. No other module spells them."""

from pathlib import Path

RAW = Path("data/raw")
"""Downloaded or rendered images and annotations: output of the fetch stage."""

INPUTS = Path("data/inputs")
"""Links to the inputs outside of `RAW`, for DVC: output of the inputs stage."""

INDEX = Path("data/index")
IMAGES = INDEX / "images.parquet"
CAPTIONS = INDEX / "captions.parquet"
CONVERSATIONS = INDEX / "conversations.parquet"
YES_NO_QUESTIONS = INDEX / "pope.parquet"
"""The tables of the index stage."""

FEATURES = Path("data/features")
"""The feature store."""

CODE = Path("data/code")
"""Hashes of the code of each stage."""

RUNS = Path("runs")
"""Run directories, named after their stages."""

REPORTS = Path("reports")
"""Reports of all stages, named after them, and the HTML page."""

WORK = Path(".work")
"""Unfinished work that must survive a kill, outside of DVC's outputs."""

SHARDS = WORK / "shards"
"""Every shard ever encoded in this workspace, of any encoder and any set of images."""
