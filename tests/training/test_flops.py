"""The formulas against PyTorch's own counter on small real models."""

import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eve.config import Model, Stream
from eve.data.batch import Batch, Sample, collate
from eve.model import build_model
from eve.objectives import build_objective
from eve.objectives.masking import ImageMasking, TextMasking
from eve.training.flops import StepFlops, batch_flops, forward_flops, mfu, peak_flops
from eve.visual_tokenizer import VisualTokenizer
from tests.objectives.test_masked_codes import make_tokenizer


def config(**changes) -> Model:
    return Model.model_validate(
        {
            "image_size": 32,
            "patch_size": 8,
            "width": 24,
            "depth": 3,
            "heads": 3,
            "hidden": 40,
            "vocab_size": 50,
            "max_text_length": 12,
            "text_positions": 12,
            "drop_path": 0.0,
            "text_dropout": 0.0,
            "feed_forward": [
                {"blocks": [0], "router": "shared"},
                {"blocks": [1], "router": "modality"},
                {"blocks": [2], "router": "topk", "num_experts": 5, "k": 2, "modality_vector": "none"},
            ],
            "decoder": {"depth": 2, "width": 16, "heads": 2},
            **changes,
        }
    )


def feed_forward_flop(x_shape, w1_shape, *args, out_shape=None, **kwargs) -> int:
    """(N, D) x (E, D, F), and back to D: each row meets one expert."""
    return 4 * math.prod(x_shape) * w1_shape[-1]


def feed_forward_backward_flop(grad_shape, x_shape, z_shape, *args, out_shape=None, **kwargs) -> int:
    """Of the inputs and of the weights of both products."""
    return 8 * math.prod(x_shape) * z_shape[-1]


def word_loss_flop(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """(K, D) x (V, D)."""
    return 2 * x_shape[0] * math.prod(weight_shape)


def word_loss_backward_flop(grad_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Of x and of the weight."""
    return 4 * x_shape[0] * math.prod(weight_shape)


def counted(run) -> int:
    """What torch counts, attention written out as matrix products."""
    mapping = {
        torch.ops.eve_kernels.masked_text_loss: word_loss_flop,
        torch.ops.eve_kernels.masked_text_loss_backward: word_loss_backward_flop,
        torch.ops.eve_kernels.expert_feed_forward: feed_forward_flop,
        torch.ops.eve_kernels.expert_feed_forward_backward: feed_forward_backward_flop,
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def batch_of(stream: Stream, lengths: list[int]) -> Batch:
    """Random pairs with texts of these lengths, and the stream's masks."""
    rng = np.random.default_rng(0)
    special_V = np.arange(50) < 5
    image = ImageMasking(4, stream.image_ratio, "random")
    text = TextMasking(stream.text_ratio, "token", 0.8, 0.1, 3, special_V, ~special_V)
    samples = []
    for index, length in enumerate(lengths):
        pixels = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)
        tokens = rng.integers(5, 50, length)
        sample = Sample(str(index), 0, index, index, image_CHW=pixels, tokens_N=tokens)
        sample.masks[stream.name] = {**image(sample, rng), **text(sample, rng)}
        if stream.objective in ("masked_image", "masked_codes"):
            sample.masks[stream.name] = image(sample, rng)
        if stream.objective == "masked_text":
            sample.masks[stream.name] = text(sample, rng)
        samples.append(sample)
    return collate(samples)


@pytest.mark.parametrize("objective", ["masked_image", "masked_text", "masked_pair"])
def test_forward_and_backward_agree_with_the_counter(objective):
    """Equal lengths, so that the padded attention of a CPU wastes nothing. The counter has no gradient
    of the pixels: the difference is one pass over the patch embedding, exactly."""
    model_config = config()
    stream = Stream(name="s", source="pairs", objective=objective)
    objective_ = build_objective(stream, model_config)
    batch = batch_of(stream, [7, 7, 7])
    model = build_model(model_config, seed=0)
    units = objective_.units(batch)
    total = counted(lambda: objective_(model, batch, units, 1.0).loss.backward())
    visible = 16 if objective == "masked_text" else 4
    embedding = forward_flops(model_config, num_samples=3, num_visible=visible, text_lengths=[7] * 3)[
        "embedding"
    ]
    assert batch_flops(model_config, stream, batch).model == total + embedding


@pytest.mark.parametrize("objective", ["contrast", "matching", "contrast_matching"])
def test_passes_of_contrast_and_matching_agree_with_the_counter(objective):
    """But for the logits of contrast and the gradient of the pixels, as above."""
    hard = [{"blocks": [0, 1], "router": "modality"}, {"blocks": [2], "router": "fusion"}]
    contrast = {"width": 16, "paths": ["modality", "fusion"]}
    model_config = config(feed_forward=hard, contrast=contrast, matching={}, decoder=None)
    stream = Stream(name="s", source="pairs", objective=objective)
    objective_ = build_objective(stream, model_config)
    batch = batch_of(stream, [7, 7, 7])
    model = build_model(model_config, seed=0)
    total = counted(lambda: objective_(model, batch, objective_.units(batch), 1.0).loss.backward())
    images = {"contrast": 1, "matching": 3, "contrast_matching": 4}[objective]
    pixels = forward_flops(model_config, num_samples=3 * images, num_visible=16, text_lengths=[])["embedding"]
    logits = 0 if objective == "matching" else 3 * 2 * 2 * 2 * 3 * 3 * 16
    assert batch_flops(model_config, stream, batch).model == total - logits + pixels


@pytest.mark.parametrize("decoder", [0, 2])
def test_pixels_from_mask_tokens_agree_with_the_counter(decoder):
    model_config = config(mask_token=True, decoder={"depth": decoder, "width": 16, "heads": 2})
    stream = Stream(name="s", source="pairs", objective="masked_image", image_input="mask_token")
    objective = build_objective(stream, model_config)
    batch = batch_of(stream, [7, 7, 7])
    model = build_model(model_config, seed=0)
    total = counted(lambda: objective(model, batch, objective.units(batch), 1.0).loss.backward())
    embedding = forward_flops(model_config, num_samples=3, num_visible=16, text_lengths=[7] * 3)["embedding"]
    assert batch_flops(model_config, stream, batch).model == total + embedding


@pytest.mark.parametrize("head", [None, {"early": 1, "depth": 2}])
@pytest.mark.parametrize("objective", ["masked_codes", "masked_pair"])
def test_codes_agree_with_the_counter(objective, head, tmp_path):
    """But for what the visual tokenizer does to the pictures."""
    model_config = config(mask_token=True, visual_codes=12, class_token_head=head, decoder=None)
    stream = Stream(name="s", source="pairs", objective=objective, image_target="codes")
    directory = str(make_tokenizer(tmp_path, 32, 8, 12))
    built = build_objective(stream, model_config, visual_tokenizer=directory)
    batch = batch_of(stream, [7, 7, 7])
    model = build_model(model_config, seed=0)
    total = counted(lambda: built(model, batch, built.units(batch), 1.0).loss.backward())
    images_BCHW = batch.images_BCHW
    assert images_BCHW is not None
    total -= counted(lambda: VisualTokenizer.load(directory).encode(images_BCHW))
    embedding = forward_flops(model_config, num_samples=3, num_visible=16, text_lengths=[7] * 3)["embedding"]
    assert batch_flops(model_config, stream, batch).model == total + embedding


def test_true_lengths_count_not_padded_ones():
    """A batch costs what its samples cost one by one."""
    model_config = config()
    stream = Stream(name="s", source="pairs", objective="masked_text")
    model = build_model(model_config, seed=0)
    objective = build_objective(stream, model_config)
    batch = batch_of(stream, [3, 12, 5, 8])
    singles = [collate([sample]) for sample in batch.samples]
    alone = sum(counted(lambda single=single: objective.predict(model, single)) for single in singles)
    assert batch_flops(model_config, stream, batch).model == 3 * alone
    assert counted(lambda: objective.predict(model, batch)) > alone


def test_the_number_of_experts_costs_only_its_gate():
    def blocks(num_experts: int) -> int:
        bank = {"blocks": [0, 1, 2], "router": "topk", "num_experts": num_experts, "k": 2}
        lengths = {"num_samples": 2, "num_visible": 16, "text_lengths": [5, 6]}
        return forward_flops(config(feed_forward=[bank]), **lengths)["blocks"]

    assert blocks(64) - blocks(4) == 3 * 2 * 24 * 60 * (2 * 17 + 11)


@pytest.mark.parametrize(("num_visible", "text_lengths"), [(16, [0, 0]), (0, [4, 9])])
def test_images_alone_and_texts_alone(num_visible, text_lengths):
    model_config = config()
    model = build_model(model_config, seed=0)
    parts = forward_flops(model_config, num_samples=2, num_visible=num_visible, text_lengths=text_lengths)

    def encode_each():
        for length in text_lengths:
            if num_visible:
                model.encode(images_BCHW=torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
            else:
                model.encode(tokens_N=torch.full((length,), 7), text_lengths=[length])

    assert sum(parts.values()) == counted(encode_each)


def test_checkpointing_adds_one_pass_of_the_blocks():
    model_config = config()
    stream = Stream(name="s", source="pairs", objective="masked_image")
    batch = batch_of(stream, [7, 7])
    plain = batch_flops(model_config, stream, batch)
    again = batch_flops(model_config, stream, batch, checkpointing=True)
    blocks = forward_flops(model_config, num_samples=2, num_visible=4, text_lengths=[7, 7])["blocks"]
    assert plain.hardware == plain.model == again.model
    assert again.hardware - again.model == blocks
    assert StepFlops(1, 2) + StepFlops(3, 4) == StepFlops(4, 6)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(name, peak):
    assert peak_flops(name) == peak


def test_mfu_is_the_share_of_all_devices():
    assert mfu(989e12, 2.0, 4, "NVIDIA H200") == 0.125
    assert mfu(1e12, 1.0, 1, "cpu") is None
