"""The encoder's variants (VLMo, BEiT, BEiT-3) against one sample at a time in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from eve.config import FeedForward, Model
from eve.model.relative_positions import num_rows
from tests.model.test_encoder import inputs, model_with_random_parameters, tiny

SIDE, TEXT_POSITIONS = 3, 16
VLMO = {
    "relative_positions": "blocks",
    "absolute_positions": False,
    "text_norm": "after_positions",
    "text_norm_eps": 1e-12,
    "embedding_norm": False,
    "activation": "gelu",
    "feed_forward": (
        FeedForward(blocks=(0, 1), router="modality"),
        FeedForward(blocks=(2,), router="fusion"),
    ),
}
VARIANTS = {
    "vlmo": VLMO,
    "vlmo base+": {**VLMO, "relative_positions": "none", "absolute_positions": True, "layer_scale": None},
    "one table for all blocks": {**VLMO, "relative_positions": "shared"},
    "attention by modality": {**VLMO, "attention": "modality", "key_bias": True},
    "beit-3": {
        "text_norm": "none",
        "embedding_norm": False,
        "activation": "gelu",
        "layer_scale": None,
        "norm_eps": 1e-5,
        "attention": "modality",
        "key_bias": True,
        "sub_norm": True,
        "final_norm": "modality",
        "feed_forward": (FeedForward(blocks=(0, 1, 2), router="modality"),),
    },
}


def row_of(query: tuple, key: tuple) -> int:
    """Of the table of relative positions; a token is ("image", row, column), ("image",) the class token,
    ("text", place)."""
    offsets = (2 * SIDE - 1) ** 2
    if query[0] != key[0]:
        return offsets + (3 if query[0] == "text" else 4)
    if query[0] == "image":
        if len(query) == 1 or len(key) == 1:
            return offsets + (2 if len(query) == len(key) else 0 if len(query) == 1 else 1)
        return (query[1] - key[1] + SIDE - 1) * (2 * SIDE - 1) + query[2] - key[2] + SIDE - 1
    last = num_rows(SIDE, TEXT_POSITIONS)
    if 0 in (query[1], key[1]):
        return last - (1 if query[1] == key[1] else 3 if query[1] == 0 else 2)
    return offsets + 5 + key[1] - query[1] + TEXT_POSITIONS - 2


def one_sample(model, image_CHW, tokens, *, fused, masked=None, visible=None):
    config, state = model.config, dict(model.encoder.named_parameters())
    width, eps = config.width, config.norm_eps

    def norm(x, name, row=None, eps=eps):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if row is not None:
            weight, bias = weight[row], bias[row]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    x, places = [], []
    if image_CHW is not None:
        weight = state["image_embedding.projection.weight"].view(width, 3, 4, 4)
        pixels = image_CHW[None].float() / 127.5 - 1
        grid = F.conv2d(pixels, weight, state["image_embedding.projection.bias"], stride=4).flatten(2)[0].t()
        if masked is not None:
            grid = torch.stack(
                [state["image_embedding.mask_token"] if m else g for g, m in zip(grid, masked, strict=True)]
            )
        image = torch.cat([state["image_embedding.class_token"][None], grid])
        if config.absolute_positions:
            image = image + state["image_embedding.position"]
        seen = range(SIDE * SIDE) if visible is None else visible.tolist()
        x += [image[0], *(image[1 + p] for p in seen)]
        places += [("image",), *(("image", p // SIDE, p % SIDE) for p in seen)]
        x = [row + state["type_embedding"][0] for row in x]
    if tokens is not None:
        text = state["text_embedding.word.weight"][tokens]
        position = state["text_embedding.position"][: len(tokens)] if config.absolute_positions else 0
        if config.text_norm == "none":
            text = text + position
        elif config.text_norm == "after_positions":
            text = norm(text + position, "text_embedding.norm", eps=config.text_norm_eps)
        x += [row + state["type_embedding"][1] for row in text]
        places += [("text", p) for p in range(len(tokens))]
    x = torch.stack(x)
    modality = [0 if place[0] == "image" else 1 for place in places]
    separate = config.attention == "modality"

    def projected(name, h, m):
        name = f"{name}.{('image', 'text')[m]}" if separate else name
        if name.split(".")[-1] in ("proj",) or ".proj." in name:
            return state[f"{name}.weight"] @ h + state[f"{name}.bias"]
        k_bias = state.get(f"{name}.k_bias", torch.zeros(width))
        bias = torch.cat([state[f"{name}.q_bias"], k_bias, state[f"{name}.v_bias"]])
        return state[f"{name}.weight"] @ h + bias

    for i in range(config.depth):
        b = f"blocks.{i}"
        h = [norm(t, f"{b}.norm1", m if separate else None) for t, m in zip(x, modality, strict=True)]
        qkv = torch.stack([projected(f"{b}.attention.qkv", t, m) for t, m in zip(h, modality, strict=True)])
        heads = []
        for head in range(config.heads):
            q, k, v = (part.chunk(config.heads, -1)[head] for part in qkv.chunk(3, -1))
            logits = q @ k.t() / q.shape[-1] ** 0.5
            if config.relative_positions != "none":
                table = state["relative_positions.table_TRH"][
                    i if config.relative_positions == "blocks" else 0
                ]
                logits = logits + torch.stack(
                    [torch.stack([table[row_of(one, other), head] for other in places]) for one in places]
                )
            heads.append(torch.softmax(logits, -1) @ v)
        out = []
        for t, m in zip(torch.cat(heads, -1), modality, strict=True):
            if config.sub_norm:
                t = norm(t, f"{b}.attention.sub_norm", m if separate else None)
            out.append(projected(f"{b}.attention.proj", t, m))
        x = x + state.get(f"{b}.gamma1", 1.0) * torch.stack(out)
        out = []
        for t, m in zip(x, modality, strict=True):
            kind = 2 if fused and config.feed_forward_of(i).router == "fusion" else m
            bank = f"{b}.feed_forward.experts.{('image', 'text', 'fusion')[kind]}"
            h = norm(t, f"{b}.norm2", kind) @ state[f"{bank}.w1_DF"] + state[f"{bank}.b1_F"]
            h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
            if config.sub_norm:
                h = norm(h, f"{bank}.sub_norm")
            out.append(h @ state[f"{bank}.w2_FD"] + state[f"{bank}.b2_D"])
        x = x + state.get(f"{b}.gamma2", 1.0) * torch.stack(out)
    if config.final_norm == "none":
        return x
    by_modality = config.final_norm == "modality"
    return torch.stack(
        [norm(t, "norm", m if by_modality else None) for t, m in zip(x, modality, strict=True)]
    )


def close(packed, expected):
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(params=VARIANTS)
def model(request):
    return model_with_random_parameters(tiny(mask_token=True, decoder=None, **VARIANTS[request.param]))


LENGTHS = [5, 3, 11]


@torch.no_grad()
@pytest.mark.parametrize("given", ["images", "texts", "pairs"])
def test_packed_equals_one_sample_at_a_time(model, given):
    images, tokens = inputs(LENGTHS)
    images = None if given == "texts" else images
    texts = {} if given == "images" else {"tokens_N": tokens, "text_lengths": LENGTHS}
    encoded = model.encode(images_BCHW=images, **texts)
    rows = encoded.texts_ND.split(LENGTHS) if texts else None
    for sample, text in enumerate(tokens.split(LENGTHS)):
        image = None if images is None else images[sample]
        expected = one_sample(model, image, text if texts else None, fused=given == "pairs")
        cut = 0 if images is None else 1 + SIDE * SIDE
        if images is not None:
            close(encoded.images_BID[sample], expected[:cut])
            close(encoded.image_class_BD[sample], expected[0])
        if rows is not None:
            close(rows[sample], expected[cut:])
            close(encoded.text_class_BD[sample], expected[cut])


@torch.no_grad()
def test_both_paths_of_one_modality():
    model = model_with_random_parameters(tiny(decoder=None, **VLMO))
    images, tokens = inputs(LENGTHS)
    texts = model.encode(tokens_N=tokens, text_lengths=LENGTHS, both_paths=True)
    for sample, text in enumerate(tokens.split(LENGTHS)):
        close(texts.texts_ND.split(LENGTHS)[sample], one_sample(model, None, text, fused=False))
        close(texts.fusion.texts_ND.split(LENGTHS)[sample], one_sample(model, None, text, fused=True))
    encoded = model.encode(images_BCHW=images, both_paths=True)
    for sample, image in enumerate(images):
        close(encoded.images_BID[sample], one_sample(model, image, None, fused=False))
        close(encoded.fusion.images_BID[sample], one_sample(model, image, None, fused=True))


@torch.no_grad()
def test_mask_tokens_stand_for_patches(model):
    images, tokens = inputs(LENGTHS)
    masked = torch.rand(3, SIDE * SIDE, generator=torch.Generator().manual_seed(1)) < 0.4
    texts = {"tokens_N": tokens, "text_lengths": LENGTHS}
    encoded = model.encode(images_BCHW=images, masked_BP=masked, **texts)
    for sample, text in enumerate(tokens.split(LENGTHS)):
        expected = one_sample(model, images[sample], text, fused=True, masked=masked[sample])
        close(encoded.images_BID[sample], expected[: 1 + SIDE * SIDE])


@torch.no_grad()
def test_visible_patches_keep_their_places(model):
    images, tokens = inputs(LENGTHS)
    visible = torch.tensor([[0, 4, 5], [2, 3, 8], [1, 6, 7]])
    texts = {"tokens_N": tokens, "text_lengths": LENGTHS}
    encoded = model.encode(images_BCHW=images, visible_BV=visible, **texts)
    for sample, text in enumerate(tokens.split(LENGTHS)):
        expected = one_sample(model, images[sample], text, fused=True, visible=visible[sample])
        close(encoded.images_BID[sample], expected[:4])
        close(encoded.texts_ND.split(LENGTHS)[sample], expected[4:])


@torch.no_grad()
def test_padding_is_computed_and_unseen(model):
    """The tokens of a text do not see padding behind it, whatever that is."""
    images, tokens = inputs(LENGTHS)
    longest = max(LENGTHS)
    padded = [F.pad(text, (0, longest - len(text)), value=7) for text in tokens.split(LENGTHS)]
    padding = torch.cat([torch.arange(longest) >= length for length in LENGTHS])
    encoded = model.encode(
        images_BCHW=images, tokens_N=torch.cat(padded), text_lengths=[longest] * 3, padding_N=padding
    )
    alone = model.encode(images_BCHW=images, tokens_N=tokens, text_lengths=LENGTHS)
    close(encoded.texts_ND[~padding], alone.texts_ND)
    close(encoded.images_BID, alone.images_BID)


def test_every_parameter_has_a_gradient(model):
    images, tokens = inputs(LENGTHS)
    model.train()
    masked = torch.ones(3, SIDE * SIDE, dtype=torch.bool).tril()
    seeds = torch.arange(3)
    texts = {"tokens_N": tokens, "text_lengths": LENGTHS, "seed_B": seeds}
    total = model.encode(images_BCHW=images, masked_BP=masked, **texts).x_TD.square().sum()
    total = total + model.encode(images_BCHW=images, seed_B=seeds).x_TD.pow(3).sum()
    (total + model.encode(**texts).x_TD.pow(3).sum()).backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_class_token_head_needs_codes():
    with pytest.raises(ValueError, match="class_token_head needs visual_codes"):
        Model(
            feed_forward=(FeedForward(blocks=tuple(range(12)), router="shared"),),
            class_token_head={"early": 3},
        )
