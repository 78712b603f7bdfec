"""Hub id, folder or file -> local files and memory-mapped tensors, bounded and checked."""
