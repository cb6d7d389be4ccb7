"""What the networks remember of the video so far: as a value, and as the sums that the layers read."""
