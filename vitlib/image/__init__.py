"""Images (path, bytes, PIL, array) -> normalised pixels: decode, resize, preprocessing configs."""
