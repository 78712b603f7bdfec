"""Census of the ViTs of timm, transformers and open_clip, each loaded and compared by vitlib."""
