"""The packed encoder against one sample at a time in plain PyTorch, written from the paper's formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eve.config import Decoder, FeedForward, Model
from eve.model import build_model, count_parameters
from eve.model.embeddings import patchify, pick, to_float, unpatchify

VOCAB = 50


def tiny(**changes):
    settings = {
        "image_size": 12,
        "patch_size": 4,
        "width": 24,
        "depth": 3,
        "heads": 3,
        "hidden": 40,
        "vocab_size": VOCAB,
        "max_text_length": 12,
        "text_positions": 16,
        "init_std": 0.2,
        "decoder": Decoder(depth=2, width=16, heads=2),
        "feed_forward": (
            FeedForward(blocks=(0, 1), router="modality"),
            FeedForward(blocks=(2,), router="topk", num_experts=5, k=2),
        ),
    }
    return Model(**{**settings, **changes})


def model_with_random_parameters(config, seed=3):
    """No parameter at zero or one, so that none can be left out unnoticed."""
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(text_lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(text_lengths), 3, 12, 12), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, VOCAB, (sum(text_lengths),), generator=generator)
    return images, tokens


def one_sample(model, image_CHW, tokens, visible):
    """The encoder of EVE on one pair: attention over its tokens, experts one by one."""
    config, state = model.config, dict(model.encoder.named_parameters())
    parts, modality = [], []
    if image_CHW is not None:
        weight = state["image_embedding.projection.weight"].view(config.width, 3, 4, 4)
        pixels = image_CHW[None].double().float() / 127.5 - 1
        grid = F.conv2d(pixels, weight, state["image_embedding.projection.bias"], stride=4)
        patches = grid.flatten(2)[0].t() + state["image_embedding.position"][1:]
        patches = patches if visible is None else patches[visible]
        first = state["image_embedding.class_token"] + state["image_embedding.position"][0]
        image = torch.cat([first[None], patches]) + state["type_embedding"][0]
        parts.append(image)
        modality += [0] * len(image)
    if tokens is not None:
        text = F.layer_norm(
            state["text_embedding.word.weight"][tokens],
            (config.width,),
            state["text_embedding.norm.weight"],
            state["text_embedding.norm.bias"],
            1e-6,
        )
        text = text + state["text_embedding.position"][: len(tokens)] + state["type_embedding"][1]
        parts.append(text)
        modality += [1] * len(text)
    modality = torch.tensor(modality)
    x = torch.cat(parts)

    def norm(x, name):
        return F.layer_norm(x, (config.width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    x = norm(x, "embedding_norm")
    for i in range(config.depth):
        block = f"blocks.{i}"
        h = norm(x, f"{block}.norm1")
        q, k, v = (h @ state[f"{block}.attention.qkv.weight"].t()).chunk(3, dim=-1)
        q, v = q + state[f"{block}.attention.qkv.q_bias"], v + state[f"{block}.attention.qkv.v_bias"]
        heads = []
        for qh, kh, vh in zip(*(t.chunk(config.heads, dim=-1) for t in (q, k, v)), strict=True):
            heads.append(torch.softmax(qh @ kh.t() / qh.shape[-1] ** 0.5, dim=-1) @ vh)
        h = torch.cat(heads, dim=-1) @ state[f"{block}.attention.proj.weight"].t()
        x = x + state[f"{block}.gamma1"] * (h + state[f"{block}.attention.proj.bias"])

        def weight(name, e, block=block):
            bank = f"{block}.feed_forward.experts"
            stacked = f"{bank}.{name.replace('_', '_E')}"
            return state[stacked][e] if stacked in state else state[f"{bank}.{('image', 'text')[e]}.{name}"]

        def expert(h, e, weight=weight):
            h = h @ weight("w1_DF", e) + weight("b1_F", e)
            return (h * torch.sigmoid(1.702 * h)) @ weight("w2_FD", e) + weight("b2_D", e)

        out = []
        for t in range(len(x)):
            m = int(modality[t])
            if config.feed_forward_of(i).router == "modality":
                gain, bias = state[f"{block}.norm2.weight"][m], state[f"{block}.norm2.bias"][m]
                out.append(expert(F.layer_norm(x[t], (config.width,), gain, bias, 1e-6), m))
            else:
                router = f"{block}.feed_forward.router"
                h = norm(x[t], f"{block}.norm2")
                gate = torch.softmax(
                    state[f"{router}.weight"] @ (h + state[f"{router}.modality_vector"][m]), 0
                )
                best = gate.topk(2)
                total = best.values.sum()
                out.append(
                    sum(g / total * expert(h, int(e)) for g, e in zip(best.values, best.indices, strict=True))
                )
        x = x + state[f"{block}.gamma2"] * torch.stack(out)
    return norm(x, "norm")


@pytest.mark.parametrize("text_lengths", [[5], [3, 9, 4], [7, 7]])
@pytest.mark.parametrize("num_visible", [None, 2])
def test_packed_encoder_equals_one_sample_at_a_time(text_lengths, num_visible):
    model = model_with_random_parameters(tiny())
    images, tokens = inputs(text_lengths)
    visible = None
    if num_visible is not None:
        visible = torch.stack([torch.randperm(9)[:num_visible].sort().values for _ in text_lengths])
    out = model.encode(images_BCHW=images, visible_BV=visible, tokens_N=tokens, text_lengths=text_lengths)
    for b, text in enumerate(tokens.split(text_lengths)):
        expected = one_sample(model, images[b], text, None if visible is None else visible[b])
        num_image = 1 + (9 if visible is None else num_visible)
        torch.testing.assert_close(out.images_BID[b], expected[:num_image], atol=1e-5, rtol=1e-5)
        got = out.texts_ND.split(text_lengths)[b]
        torch.testing.assert_close(got, expected[num_image:], atol=1e-5, rtol=1e-5)


def test_unimodal_inputs_equal_one_sample_at_a_time():
    model = model_with_random_parameters(tiny())
    images, tokens = inputs([4, 6])
    text_only = model.encode(tokens_N=tokens, text_lengths=[4, 6])
    image_only = model.encode(images_BCHW=images)
    for b, text in enumerate(tokens.split([4, 6])):
        expected = one_sample(model, None, text, None)
        torch.testing.assert_close(text_only.texts_ND.split([4, 6])[b], expected, atol=1e-5, rtol=1e-5)
        expected = one_sample(model, images[b], None, None)
        torch.testing.assert_close(image_only.images_BID[b], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_output_and_noise_of_a_sample_do_not_depend_on_its_batch(drop_path):
    model = model_with_random_parameters(tiny(drop_path=drop_path, text_dropout=drop_path)).train()
    lengths = [3, 9, 4]
    images, tokens = inputs(lengths)
    seed_B = torch.tensor([11, 22, 33])
    together = model.encode(images_BCHW=images, tokens_N=tokens, text_lengths=lengths, seed_B=seed_B)
    alone = model.encode(images_BCHW=images[1:2], tokens_N=tokens[3:12], text_lengths=[9], seed_B=seed_B[1:2])
    torch.testing.assert_close(together.images_BID[1], alone.images_BID[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.texts_ND[3:12], alone.texts_ND, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = model_with_random_parameters(tiny()).train()
        if checkpointing:
            model.enable_checkpointing()
        images, tokens = inputs([3, 9, 4])
        seed_B = torch.tensor([1, 2, 3])
        out = model.encode(images_BCHW=images, tokens_N=tokens, text_lengths=[3, 9, 4], seed_B=seed_B)
        out.x_TD.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_decoder_does_not_depend_on_the_order_of_patches():
    model = model_with_random_parameters(tiny())
    hidden = torch.randn(2, 4, 24)
    visible = torch.tensor([[0, 4, 8], [1, 2, 3]])
    masked = torch.tensor([[1, 2, 3, 5, 6, 7], [0, 4, 5, 6, 7, 8]])
    order, inverse = torch.tensor([3, 1, 0, 5, 4, 2]), torch.tensor([2, 1, 5, 0, 4, 3])
    pred = model.decoder(hidden, visible, masked)
    shuffled = model.decoder(hidden, visible, masked[:, order])
    torch.testing.assert_close(shuffled[:, inverse], pred, atol=1e-5, rtol=1e-5)


def test_patchify_matches_unfold_and_inverts():
    images = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    patches = patchify(images, 4)
    assert torch.equal(patches.float(), F.unfold(images.float(), 4, stride=4).transpose(1, 2))
    assert torch.equal(unpatchify(patches, 4), images)
    index = torch.tensor([[8, 0], [3, 3]])
    assert torch.equal(pick(patches, index)[1, 0], patches[1, 3])
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_initial_weights_are_a_function_of_seed_and_name():
    """A deeper model starts with the same first blocks; another seed with other ones."""
    shallow = dict(build_model(tiny(), 7).named_parameters())
    deep_config = tiny(depth=4, feed_forward=(FeedForward(blocks=(0, 1, 2, 3), router="modality"),))
    deep = dict(build_model(deep_config, 7).named_parameters())
    other = dict(build_model(tiny(), 8).named_parameters())
    name = "encoder.blocks.1.attention.proj.weight"
    assert torch.equal(shallow[name], deep[name])
    assert not torch.equal(shallow[name], other[name])
    assert not torch.equal(shallow[name], shallow["encoder.blocks.0.attention.proj.weight"])
    assert float(shallow[name].detach().abs().max()) <= 0.2
    experts = shallow["encoder.blocks.2.feed_forward.experts.w1_EDF"]
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize(
    ("size", "total", "soft", "active"),
    [("base", 475e6, 302e6, 94.5e6), ("large", 1.33e9, 806e6, None)],
)
def test_parameter_counts_are_the_papers(size, total, soft, active):
    """The EVE paper: of the encoder in all, of the experts of its soft layers, of one token's path."""
    from eve.config import load_recipe

    counts = count_parameters(load_recipe(f"eve_{size}").model)
    assert counts.encoder == pytest.approx(total, rel=0.005)
    assert counts.routed_experts == pytest.approx(soft, rel=0.002)
    if active is not None:
        assert counts.active == pytest.approx(active, rel=0.002)


def test_noise_is_uniform_and_independent():
    from eve import random

    numbers = random.uniform(torch.arange(200)[:, None], torch.arange(-100, 100)).numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    chi_square = ((counts - numbers.size / 20) ** 2 / (numbers.size / 20)).sum()
    assert chi_square < 43.8  # 99.9 % point of 19 degrees of freedom
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02
