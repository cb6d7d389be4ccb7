"""What is measured. `python -m benchmarks` (on the CPU) and its modules `gpu`, `presets`, `toon` and `long_video` are
commands, each with its figures in a file of its name; `released` is the yardstick; `measures`, `networks`, `timing`,
`results` and `chart` are what they share.
"""
