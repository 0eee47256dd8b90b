"""The places of a workspace, relative to the working directory; written here and nowhere else."""

from pathlib import Path

RAW = Path("data/raw")
"""What the fetch stage brings."""

INDEX = Path("data/index")
IMAGES = INDEX / "images.parquet"
CAPTIONS = INDEX / "captions.parquet"
CONVERSATIONS = INDEX / "conversations.parquet"
YES_NO_QUESTIONS = INDEX / "pope.parquet"
"""The tables of the index stage."""

FEATURES = Path("data/features")
"""The feature store."""

CODE = Path("data/code")
"""The hashes of each stage's code."""

RUNS = Path("runs")
"""Run directories, each under the name of its stage."""

REPORTS = Path("reports")
"""Reports of all stages, each under the name of its stage, and the page."""

WORK = Path(".work")
"""Everything that must survive a kill is built here, outside every output of DVC."""

SHARDS = WORK / "shards"
"""Every shard ever encoded here, under its name; of any encoder and any set of images."""
