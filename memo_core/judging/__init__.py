"""Whether a video still looks like its portrait."""
