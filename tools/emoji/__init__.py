"""The default data of `make pretrain`: drawings, names and captions of emoji, and their split."""
