"""Checkpoints between layouts, on a CPU and one tensor at a time.

checkpoint.py      what every source gives: parameters by their names on one device, read one by one
sources.py         the table of formats that can be read
layout.py          degrees of parallelism -> files of a DeepSpeed checkpoint, and which elements of
                   which parameter lie where in them; reading and writing follow the same map
torch_files.py     DeepSpeed's pickles, read and written through memory maps
deepspeed_reader.py   deepspeed_writer.py
open_directory.py  the topology-free directory of safetensors, read and written
upcycling.py       a source with other experts than its own
verification.py    two checkpoints hold the same tensors
"""
