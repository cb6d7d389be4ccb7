"""The toon world: heads and voices drawn by formulas, where the truth of every frame is known exactly.

heads.py      draws and moves cartoon heads           voices.py     speaks in formant-synthesised voices
judge.py      reads motion back from frames           sizes.py      sizes of the toon networks
vae.py  speech.py   train the small VAE and encoders  data.py       performances as training shards
evaluate.py   measures a toon checkpoint on faces and voices it has not seen
"""
