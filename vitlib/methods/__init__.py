"""Methods of ViT beyond its forward; each imports what it does when it is called."""
