"""MAE: latent, prediction and both losses for the masking noise of the fixture; sine-cosine tables.

Shape suffixes: B sample, P patch, V visible, M masked, K pixel of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eve.conversion.foreign import pixels
from eve.conversion.foreign.mae import pixel_order
from eve.model.decoder import sine_cosine_positions
from eve.model.embeddings import patchify, pick, unpatchify
from eve.objectives.masking import num_masked_patches
from kernels.masked_pixel_loss import pixel_target
from tools.import_checks.fixture import Fixture
from tools.import_checks.trace import Trace


def pretrain(fixture: Fixture) -> dict[str, Tensor]:
    hyper, images_BCHW = fixture.hyper, fixture.inputs["imgs"]
    sizes = {"heads": hyper["heads"], "decoder_heads": hyper["dheads"], "norm_eps": hyper["eps"]}
    model = fixture.imported("mae", **sizes).build()
    decoder, patch = model.decoder, model.config.patch_size
    assert decoder is not None
    # They keep the patches of the least noise, in that order.
    order_BP = fixture.inputs["noise"].argsort(dim=1)
    num_visible = order_BP.shape[1] - num_masked_patches(order_BP.shape[1], hyper["mask_ratio"])
    visible_BV, masked_BM = order_BP[:, :num_visible], order_BP[:, num_visible:]
    ours = pixels.to_our_statistics(images_BCHW, pixels.IMAGENET_MEAN, pixels.IMAGENET_STD)
    trace = Trace(model, images_BCHW=ours, visible_BV=visible_BV)
    latent = trace.encoded.images_BID
    sorted_BPK = decoder(latent, visible_BV, masked_BM, visible_too=True)
    where_BPK = order_BP[..., None].expand_as(sorted_BPK)
    pred_BPK = torch.empty_like(sorted_BPK).scatter(1, where_BPK, sorted_BPK)
    # What is predicted has their statistics.
    target_BPK = patchify(images_BCHW, patch)
    # The loss of training takes bytes, so its target is taken here.
    pred_BMK, true_BMK = pick(pred_BPK, masked_BM), pick(target_BPK, masked_BM)
    losses = {
        name: (pred_BMK - pixel_target(true_BMK, normalised)).square().mean()
        for name, normalised in (("loss_raw_pixels", False), ("loss_norm_pixels", True))
    }
    side = model.config.image_size // patch
    theirs_K = pixel_order(patch).argsort()
    return {
        **losses,
        "latent": latent,
        "visible_embed": trace.embedded_BLD[:, 1:],
        "mask": torch.zeros(order_BP.shape).scatter(1, masked_BM, 1.0),
        "ids_keep": visible_BV,
        "ids_restore": order_BP.argsort(dim=1),
        "pred": pred_BPK[..., theirs_K],
        "pred_image": unpatchify(pred_BPK, patch),
        "target_patches": target_BPK[..., theirs_K],
        "sincos_pos_embed": sine_cosine_positions(side, model.config.width),
        "sincos_decoder_pos_embed": sine_cosine_positions(side, decoder.positions.shape[-1]),
    }


CHECKS = {"mae": pretrain}
