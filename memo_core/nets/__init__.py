"""The networks that MEMO is: Reference Net, Diffusion Net, their layers and projections."""
