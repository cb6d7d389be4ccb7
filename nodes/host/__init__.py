"""All that the nodes ask of the ComfyUI host."""
