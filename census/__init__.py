"""The census: every plain ViT of timm, transformers and open_clip, read by vitlib and compared."""
