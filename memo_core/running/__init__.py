"""How networks are run: number formats, threads, host memory, compilation, graphs."""
