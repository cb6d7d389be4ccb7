"""What sampling takes on a device, and how to get by with less."""
