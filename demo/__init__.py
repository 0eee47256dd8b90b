"""The embedded default: a small drawn world and two tiny checkpoints that know it."""
