"""EVE: features, hidden states and routing of pair, image and text; contrast, matching; VQA and NLVR2.

Shape suffixes: B sample, L token of a sample, S token of the batch, E expert, R learned router, K choice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eve.conversion.foreign.formats import Imported
from eve.model import VisionLanguageModel
from eve.moe.routers import capacity
from eve.objectives.contrast import contrast_loss, similarity
from eve.objectives.matching import matching_loss, negative_weights
from tools.import_checks.fixture import Fixture
from tools.import_checks.trace import Trace, texts

# Added to each weight by which a negative may be drawn.
FLOOR = 1e-5
PATH = "modality"


def retrieval(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = _imported(fixture).build(), fixture.inputs
    images_BCHW, text = inputs["image"], _texts(fixture)
    pair = Trace(model, images_BCHW=images_BCHW, **text)
    image = Trace(model, images_BCHW=images_BCHW)
    words = Trace(model, **text)
    found = {"pair_embed": pair.embedded_BLD}
    for name, trace in (("pair", pair), ("image", image), ("text", words)):
        found |= {f"{name}_{key}": value for key, value in _inside(model, trace).items()}
    head = model.contrast
    assert head is not None
    assert model.matching is not None
    image_BD = head.project_images(image.encoded.image_class_BD, PATH)
    text_BD = head.project_texts(words.encoded.text_class_BD, PATH)
    logits = similarity(image_BD, text_BD, head.scale(PATH))
    same_BB = inputs["idx"][:, None] == inputs["idx"][None]
    match_B2 = model.matching(pair.encoded.text_class_BD)
    found |= {
        "itm_logits": match_B2,
        "itc_image_feat": image_BD,
        "itc_text_feat": text_BD,
        "itc_logits": logits.image_to_text_BN,
        # Their evaluation leaves the final norm out.
        "eval_image_feat": head.project_images(image.hidden_EBLD[-1][:, 0], PATH),
        "eval_text_feat": head.project_texts(words.hidden_EBLD[-1][:, 0], PATH),
        "loss_itc": contrast_loss(logits, same_BB, targets="soft").mean(),
        "itm_weights_i2t": _weights(logits.image_to_text_BN, same_BB),
        "itm_weights_t2i": _weights(logits.text_to_image_BN, same_BB),
    }
    other_images = images_BCHW[inputs["itm_neg_image_idx"]]
    negatives = [
        model.encode(images_BCHW=other_images, **text),
        model.encode(images_BCHW=images_BCHW, **_texts(fixture, inputs["itm_neg_text_idx"])),
    ]
    matches = [match_B2, *(model.matching(encoded.text_class_BD) for encoded in negatives)]
    label_X = (torch.arange(3 * len(match_B2)) < len(match_B2)).long()
    passes = [trace.encoded for trace in (image, words, pair)] + negatives
    found["loss_itm"] = matching_loss(torch.cat(matches), label_X).mean()
    found["loss_gate"] = torch.stack([encoded.aux_loss() for encoded in passes]).mean()
    return found


def vqa(fixture: Fixture) -> dict[str, Tensor]:
    imported = _imported(fixture)
    encoded = imported.build().encode(images_BCHW=fixture.inputs["image"], **_texts(fixture))
    logits = imported.heads["vqa"](encoded.text_class_BD)
    loss = F.binary_cross_entropy_with_logits(logits, fixture.inputs["vqa_targets"].float())
    return {"vqa_logits": logits, "vqa_loss": loss * logits.shape[1], "gate_loss": encoded.aux_loss()}


def nlvr2(fixture: Fixture) -> dict[str, Tensor]:
    """Both heads: class tokens, or attention from one pair to the other."""
    imported = _imported(fixture)
    model, head, text = imported.build(), imported.heads["nlvr2"], _texts(fixture)
    pairs = [Trace(model, images_BCHW=fixture.inputs[name], **text) for name in ("image", "image2")]
    first, second = (pair.encoded for pair in pairs)
    if fixture.hyper["biattn"]:
        assert first.layout.keys_BL is not None
        logits = head(*(pair.features_BLD for pair in pairs), first.layout.keys_BL)
    else:
        logits = head(torch.cat([first.text_class_BD, second.text_class_BD], dim=1))
    return {
        "nlvr_logits": logits,
        "nlvr_loss": F.cross_entropy(logits, fixture.inputs["targets"]),
        "gate_loss": (first.aux_loss() + second.aux_loss()) / 2,
    }


def _inside(model: VisionLanguageModel, trace: Trace) -> dict[str, Tensor]:
    """Hidden states, and what each learned router did, tokens in the order of the batch."""
    found = {"feats": trace.features_BLD, "hidden_states": trace.hidden_EBLD}
    routing, layout = trace.encoded.routing, trace.encoded.layout
    if not routing:
        return found
    assert trace.routed_in_EBLD is not None
    assert trace.routed_out_EBLD is not None
    logits_RSE = torch.stack([router.logits_TE for router in routing])[:, layout.sorted_T]
    expert, kept, place, weight = (
        torch.stack([getattr(router.choices, name) for router in routing])[:, layout.sorted_T]
        for name in ("expert_TK", "kept_TK", "place_TK", "weight_TK")
    )
    num_experts = logits_RSE.shape[-1]
    return found | {
        "moe_in": trace.routed_in_EBLD,
        "moe_out": trace.routed_out_EBLD,
        "gate_logits": logits_RSE,
        "gate_probs": logits_RSE.softmax(-1),
        "gate_idx": expert,
        "gate_kept": kept,
        "gate_slot": place.where(kept, -1).long(),
        "gate_weights": weight,
        "l_aux": torch.stack([router.stats.load_balance for router in routing]),
        "first_choice_counts": torch.stack([e[:, 0].bincount(minlength=num_experts) for e in expert]),
        "capacity": _capacities(model, routing, layout.num_tokens),
    }


def _capacities(model: VisionLanguageModel, routing: list[Any], num_tokens: int) -> Tensor:
    """(R,): slots of an expert, all tokens being one group."""
    settings = [model.config.feed_forward_of(router.stats.layer) for router in routing]
    return torch.cat(
        [
            capacity(
                torch.tensor([num_tokens]),
                one.num_experts,
                one.k,
                one.capacity_factor_eval,
                one.capacity_rule,
                one.min_capacity,
            )
            for one in settings
        ]
    )


def _weights(logits_BB: Tensor, same_BB: Tensor) -> Tensor:
    return negative_weights(logits_BB, same_BB) + FLOOR * ~same_BB


def _imported(fixture: Fixture) -> Imported:
    hyper = fixture.hyper
    sizes = {
        "heads": hyper["heads"],
        "max_text_length": hyper["text_max"],
        "capacity_factor": hyper["capacity_factor"],
        "group_size": len(fixture.inputs["image"]),
    }
    sizes |= {name: hyper[name] for name in ("min_capacity", "gateloss_weight") if name in hyper}
    return fixture.imported("eve", **sizes)


def _texts(fixture: Fixture, index_B: Tensor | None = None) -> dict[str, Any]:
    """Those of the fixture, or some of them by number."""
    ids, real = fixture.inputs["text_ids"], fixture.inputs["text_atts"]
    index_B = torch.arange(len(ids)) if index_B is None else index_B
    return texts(ids[index_B], real[index_B] == 0)


CHECKS = {
    "eve_nodrop": retrieval,
    "eve_drop": retrieval,
    "eve_vqa": vqa,
    "eve_nlvr2": nlvr2,
    "eve_nlvr2_biattn": nlvr2,
}
