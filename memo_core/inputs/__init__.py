"""What goes in: recordings, voices, emotions, portraits."""
