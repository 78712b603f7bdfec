"""Images in, labels, embeddings or attention out: Predictor and the engine under it."""
