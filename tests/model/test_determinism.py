"""Same parameters, same batch: the same bits, with several threads and at sizes where they share the work."""

import torch

from eve.config import load_recipe
from eve.model import build_model


def test_gradients_are_the_same_bits_each_time():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = load_recipe("eve_tiny").model
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (64, 3, 64, 64), generator=generator, dtype=torch.uint8)
        lengths = torch.randint(3, 24, (64,), generator=generator).tolist()
        tokens = torch.randint(0, 4000, (sum(lengths),), generator=generator)
        visible = torch.stack([torch.randperm(16, generator=generator)[:4].sort().values for _ in range(64)])
        model = build_model(config, 1).train()
        runs = []
        for _ in range(6):
            model.zero_grad()
            out = model.encode(images_BCHW=images, visible_BV=visible, tokens_N=tokens, text_lengths=lengths)
            out.x_TD.square().sum().backward()
            runs.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        for run in runs[1:]:
            for name, gradient in runs[0].items():
                assert torch.equal(gradient, run[name]), name
    finally:
        torch.set_num_threads(threads)
