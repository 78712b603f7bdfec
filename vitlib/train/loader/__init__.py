"""Training photos: decoded, augmented, cached and put into batches ahead of the step."""
