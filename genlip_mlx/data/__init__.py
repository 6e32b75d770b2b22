"""Records from any source, packing, the resumable pipeline, synthetic scenes."""
