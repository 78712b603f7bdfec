"""Inputs of a batch: folders, tar files, lists of paths, URLs or base64 text."""
