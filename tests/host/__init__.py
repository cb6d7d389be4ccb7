"""Tests that run a real ComfyUI; a package, so that its conftest does not hide the one above."""
