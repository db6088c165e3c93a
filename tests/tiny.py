"""A data set and a recipe of a second: coloured shapes with a sentence each, a model of width 32."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from eve.config import Recipe, load_recipe
from eve.data.shard_writer import Record, write_shards
from tools.train_tokenizer import train

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle")
PLACES = ("left", "right", "top", "bottom")
VOCABULARY = 40


def make_record(number: int) -> Record:
    draw_from = np.random.default_rng(number)
    colour = COLOURS[draw_from.integers(len(COLOURS))]
    shape = SHAPES[draw_from.integers(len(SHAPES))]
    place = PLACES[draw_from.integers(len(PLACES))]
    image = Image.new("RGB", (40, 40), "white")
    x, y = {"left": (4, 14), "right": (24, 14), "top": (14, 4), "bottom": (14, 24)}[place]
    draw = ImageDraw.Draw(image)
    box = (x, y, x + 12, y + 12)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y + 12), (x + 12, y + 12), (x + 6, y)], fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    captions = [f"a {colour} {shape} at the {place}", f"the {place} holds a {colour} {shape}"]
    return Record(
        f"{number:05d}",
        buffer.getvalue(),
        "png",
        captions[: 1 + number % 2],
        {"shape": shape, "colour": colour},
    )


def write_tiny(directory: Path, num_samples: int = 90) -> Path:
    """Shards, tokenizer and recipe below the directory; returns the recipe's path."""
    records = [make_record(number) for number in range(num_samples)]
    write_shards(records, directory / "train", shard_size=32)
    captions = [caption for record in records for caption in record.captions]
    (directory / "tokenizer.model").write_bytes(train(captions, VOCABULARY))
    recipe = directory / "tiny.yaml"
    recipe.write_text(RECIPE.format(directory=directory, vocab_size=VOCABULARY))
    return recipe


def tiny_recipe(path: Path, *overrides: str) -> Recipe:
    return load_recipe(str(path), overrides)


RECIPE = """
name: tiny
seed: 3
model:
  image_size: 32
  patch_size: 8
  width: 32
  depth: 2
  heads: 2
  hidden: 64
  vocab_size: {vocab_size}
  max_text_length: 16
  text_positions: 16
  drop_path: 0.1
  text_dropout: 0.1
  feed_forward:
    - {{blocks: 0, router: modality}}
    - {{blocks: 1, router: topk, num_experts: 4, k: 2, group_size: 2}}
  decoder: {{depth: 1, width: 16, heads: 2}}
data:
  tokenizer: {directory}/tokenizer.model
  num_readers: 4
  shuffle_buffer: 64
  sources:
    pairs:
      mix:
        - {{shards: {directory}/train/*.tar}}
      batch_size: 16
stages:
  - name: pretrain
    steps: 12
    lr: 2.0e-3
    warmup_steps: 2
    streams:
      - {{name: masked_image, source: pairs, objective: masked_image}}
      - {{name: masked_text, source: pairs, objective: masked_text}}
training:
  num_workers: 0
  log_every: 2
  images_every: 1000
  checkpoint_every: 4
"""
