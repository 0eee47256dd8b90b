"""Vision towers of open_clip, transformers and timm, and the pixels that each wants."""
