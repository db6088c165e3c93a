"""Weights of other projects under our names, and back.

names.py        a reader over an official state: what was used, what is missing, what is unknown
formats.py      the table of formats, and what importing one gives
vlmo.py  eve.py  beit.py  beit3.py  mae.py     one family of official layouts each
positions.py    tables of positions for another resolution or another length of text
pixels.py       other pixel statistics, folded into the patch projection
fitting.py      imported weights as the start of another recipe's model
state_files.py  the files that such states come in
checkpoint.py   an imported checkpoint as a source of a conversion
"""
