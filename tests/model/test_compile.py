"""torch.compile traces every kind of block, forward and backward, and changes nothing.

Through the tracer without the code generator: what can break is the tracing, and this takes seconds.
"""

import pytest
import torch

from eve.config import FeedForward
from tests.model.test_encoder import inputs, model_with_random_parameters, tiny

PLAIN = {"num_experts": 4, "capacity_factor": 1.0}
POOLS = {
    "experts_by_modality": (4, 1), "k": 1, "modality_vector": "none", "noise": "gaussian", "load_weight": 0.1,
    "importance_weight": 0.1, "capacity_factor": 0.8, "drop_order": "priority", "renormalise": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("router", "settings"), [("shared", PLAIN), ("modality", PLAIN), ("topk", PLAIN), ("topk", POOLS)]
)
def test_compiled_blocks_equal_eager_ones(router, settings):
    gradients = []
    for compiled in (False, True):
        config = tiny(
            depth=2,
            feed_forward=(FeedForward(blocks=(0, 1), router=router, **settings),),
        )
        model = model_with_random_parameters(config).train()
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(backend="aot_eager", dynamic=True, fullgraph=True)
        for lengths in ([3, 9, 4], [2, 2, 5]):
            images, tokens = inputs(lengths)
            out = model.encode(
                images_BCHW=images, tokens_N=tokens, text_lengths=lengths, seed_B=torch.arange(3)
            )
            (out.x_TD.square().sum() + out.aux_loss()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4, msg=name)
