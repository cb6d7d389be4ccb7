"""Videos: clips of finished frames, read and written as streams, joined."""
