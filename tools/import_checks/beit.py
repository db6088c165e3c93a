"""BEiT and BEiT v2: features, hidden states, codes of masked patches, classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from eve.model import VisionLanguageModel
from eve.model.relative_positions import image_index
from tools.import_checks.fixture import Fixture
from tools.import_checks.hidden_states import HiddenStates


def pretrain(fixture: Fixture) -> dict[str, Tensor]:
    """Also BEiT v2, with and without its class-token head."""
    sizes = {"heads": fixture.hyper["heads"], "norm_eps": fixture.hyper["eps"]}
    sizes |= {"early": fixture.hyper["early"]} if "early" in fixture.hyper else {}
    form = "beit2" if fixture.name.startswith("beit2") else "beit"
    model = fixture.imported(form, **sizes).build()
    images, masked_BP = fixture.inputs["image"], fixture.inputs["bool_masked_pos"].bool()
    labels_K = fixture.inputs["labels"]
    head = model.config.class_token_head
    early = None if head is None else head.early
    hidden = HiddenStates(model)
    with hidden:
        encoded = model.encode(images_BCHW=images, masked_BP=masked_BP, early=early)
    assert model.code_head is not None
    logits = model.code_head(encoded.images_BID[:, 1:])
    found = {
        "features": encoded.images_BID,
        "hidden_states": hidden.images(encoded.layout),
        "logits_all": logits,
        "logits_masked": logits[masked_BP],
        "features_unmasked": model.encode(images_BCHW=images).images_BID,
        **positions(model),
    }
    loss = F.cross_entropy(found["logits_masked"], labels_K)
    if head is not None:
        found["features_cls_pt"] = model.class_token_hidden(encoded)
        found["logits_cls_pt_all"] = model.class_token_codes(found["features_cls_pt"][:, 1:])
        found["logits_cls_pt_masked"] = found["logits_cls_pt_all"][masked_BP]
        loss = loss + F.cross_entropy(found["logits_cls_pt_masked"], labels_K)
    return found | {"mim_loss": loss}


def finetune(fixture: Fixture) -> dict[str, Tensor]:
    hyper = fixture.hyper
    imported = fixture.imported("beit", heads=hyper["heads"], norm_eps=hyper["eps"])
    model, head = imported.build(), imported.heads["image"]
    hidden = HiddenStates(model)
    with hidden:
        encoded = model.encode(images_BCHW=fixture.inputs["image"])
    return {
        "features": head.pool(encoded.images_BID),  # pyright: ignore[reportCallIssue]
        "hidden_states": hidden.images(encoded.layout),
        "logits": head(encoded.images_BID),
        **positions(model),
    }


def positions(model: VisionLanguageModel) -> dict[str, Tensor]:
    config = model.config
    found = {}
    if config.relative_positions != "none":
        found["relative_position_index"] = image_index(config.image_size // config.patch_size)
    relative = model.encoder.relative_positions
    if config.relative_positions == "shared" and relative is not None:
        found["rel_pos_bias"] = relative(found["relative_position_index"], 0)
    return found


CHECKS = {"beit_pretrain": pretrain, "beit2_pretrain": pretrain, "beit_finetune": finetune}
