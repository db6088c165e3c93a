"""A picture as words of a visual language: each patch becomes the number of one of K codes (BEiT v2's VQ-KD,
Peng et al. 2022).

    pixels -> ViT -> MLP to few numbers, of length 1 -> nearest code -> small ViT -> MLP -> target

The target is the picture itself (as in VQ-VAE), or what a teacher says of each patch (as in BEiT v2).

Shape suffixes: B sample, P patch, C pixels of a patch, F numbers of a target, N vector, W width of a code.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eve.errors import UserError
from eve.model.embeddings import patchify, to_float, unpatchify
from eve.model.initialisation import initialise
from eve.model.layers import keep_all
from eve.visual_tokenizer.config import VisualTokenizerConfig
from eve.visual_tokenizer.patches import PatchTransformer
from eve.visual_tokenizer.quantiser import ALONE, Quantiser, Ranks

WEIGHTS = "visual_tokenizer.safetensors"
CONFIG = "visual_tokenizer.json"
# Below the deviation of a patch, as MAE has it.
_EPS = 1e-6


@dataclass(frozen=True)
class Reconstruction:
    """`loss` has the gradient: error + commitment * distance of the vectors from their codes. `error`: mean
    squared error of the pixels, or 1 - cosine of the features. `vectors_NW`, `codes_N`: what the quantiser is
    updated by."""

    loss: Tensor
    error: Tensor
    distance: Tensor
    pred_BPF: Tensor
    vectors_NW: Tensor
    codes_N: Tensor


class VisualTokenizer(nn.Module):
    def __init__(self, config: VisualTokenizerConfig, seed: int = 0):
        """With the initial weights of the seed; `begin` sets what depends on the data."""
        super().__init__()
        self.config = config
        encoder, decoder = config.encoder, config.decoder
        self.encoder = PatchTransformer(3 * config.patch_size**2, config.stack_model(encoder))
        self.to_code = _mlp(encoder.width, config.code_width)
        self.quantiser = Quantiser(
            config.codes, config.code_width, decay=config.decay, revive_below=config.revive_below, seed=seed
        )
        self.decoder = PatchTransformer(config.code_width, config.stack_model(decoder))
        self.to_target = _mlp(decoder.width, config.target_width)
        parameters = dict(self.named_parameters())
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        initialise(parameters, shapes, keep_all, seed=seed, std=config.init_std, rescale=False)

    def vectors(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B * P, W), before they are brought to length 1."""
        patches_BPC = to_float(patchify(images_BCHW, self.config.patch_size))
        return self.to_code(self.encoder(patches_BPC)).flatten(0, 1)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> int64 (B, P), in the order of the patches of the model."""
        size = self.config.image_size
        if tuple(images_BCHW.shape[1:]) != (3, size, size):
            raise ValueError(f"images are {tuple(images_BCHW.shape)}, expected (B, 3, {size}, {size})")
        unit_NW = F.normalize(self.vectors(images_BCHW).float(), dim=-1)
        return self.quantiser.nearest(unit_NW).view(len(images_BCHW), -1)

    @torch.no_grad()
    def decode(self, codes_BP: Tensor) -> Tensor:
        """int64 (B, P) -> (B, P, F): the target that the codes stand for."""
        return self._decode(F.embedding(codes_BP, self.quantiser.codes_KW))

    def to_images(self, target_BPF: Tensor, like_BCHW: Tensor) -> Tensor:
        """(B, P, F) -> uint8 (B, 3, H, W). Where pixels are normalised, mean and deviation of each patch are
        those of the true picture: the codes do not hold them. Features have no picture."""
        if self.config.target == "normalised_pixels":
            mean, std = _moments(to_float(patchify(like_BCHW, self.config.patch_size)))
            target_BPF = target_BPF * std + mean
        assert self.config.target != "features"
        pixels = target_BPF.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return unpatchify(pixels, self.config.patch_size)

    def pixel_target(self, images_BCHW: Tensor) -> Tensor:
        """(B, P, F) of a target of pixels."""
        raw_BPC = to_float(patchify(images_BCHW, self.config.patch_size))
        if self.config.target == "pixels":
            return raw_BPC
        mean, std = _moments(raw_BPC)
        return (raw_BPC - mean) / std

    @torch.no_grad()
    def begin(self, images_BCHW: Tensor, features_BPF: Tensor | None = None, ranks: Ranks = ALONE) -> None:
        """Before the first step, on its batch: the prediction begins at the mean target, and k-means places
        the codes. Were the mean still to be learned, its large gradient, the same for all patches, would turn
        all vectors one way, and with them all codes.
        """
        target_BPF = self.pixel_target(images_BCHW) if features_BPF is None else features_BPF
        mean_F = ranks.all_reduce_sum(target_BPF.float().mean((0, 1))) / ranks.number
        self.to_target[-1].bias.copy_(mean_F)  # pyright: ignore
        self.quantiser.place(self.vectors(images_BCHW), ranks)

    def forward(self, images_BCHW: Tensor, features_BPF: Tensor | None = None) -> Reconstruction:
        """`features_BPF`: those of the teacher, where they are the target."""
        vectors_NW = self.vectors(images_BCHW)
        quantised = self.quantiser(vectors_NW)
        pred_BPF = self._decode(quantised.vectors_NW.unflatten(0, (len(images_BCHW), -1)))
        if self.config.target == "features":
            assert features_BPF is not None
            error = 1 - F.cosine_similarity(pred_BPF.float(), features_BPF.float(), dim=-1).mean()
        else:
            error = (pred_BPF.float() - self.pixel_target(images_BCHW)).square().mean()
        return Reconstruction(
            loss=error + self.config.commitment * quantised.distance,
            error=error.detach(),
            distance=quantised.distance.detach(),
            pred_BPF=pred_BPF.detach(),
            vectors_NW=vectors_NW.detach(),
            codes_N=quantised.codes_N,
        )

    def _decode(self, vectors_BPW: Tensor) -> Tensor:
        return self.to_target(self.decoder(vectors_BPW))

    def save(self, directory: str | Path) -> None:
        """Weights as safetensors and the configuration as JSON."""
        save_visual_tokenizer(Path(directory), self.config, self.state_dict())

    @classmethod
    def load(cls, directory: str | Path) -> VisualTokenizer:
        """On the CPU, in evaluation mode, its parameters frozen. Raises UserError."""
        directory = Path(directory)
        tokenizer = cls(load_config(directory))
        path = directory / WEIGHTS
        try:
            state = load_file(path)
        except FileNotFoundError:
            raise UserError(f"{directory} is not a visual tokenizer: it has no {WEIGHTS}") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        check_state(tokenizer, state, str(path))
        tokenizer.load_state_dict(state)
        return tokenizer.eval().requires_grad_(False)


def load_config(directory: str | Path) -> VisualTokenizerConfig:
    """Raises UserError where the directory holds no visual tokenizer."""
    path = Path(directory) / CONFIG
    try:
        return VisualTokenizerConfig.model_validate_json(path.read_text())
    except OSError:
        raise UserError(
            f"{directory} is not a visual tokenizer: it has no {CONFIG}; make one with "
            "python -m tools.train_visual_tokenizer"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not the configuration of a visual tokenizer: {_first(error)}") from None


def check_state(tokenizer: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Raises UserError for the first name that is missing, not expected or of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "missing"
        wanted = expected.get(name, "no such tensor")
        if found != wanted:
            raise UserError(f"{where} is of another visual tokenizer: {name} is {found}, expected {wanted}")


def save_visual_tokenizer(directory: Path, config: VisualTokenizerConfig, state: dict[str, Tensor]) -> None:
    """Raises UserError where it cannot be written."""
    temporary = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in state.items()},
            temporary / WEIGHTS,
            metadata={"format": "pt"},
        )
        (temporary / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
        directory.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            (temporary / name).replace(directory / name)
        temporary.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"the visual tokenizer cannot be written to {directory}: {error}") from None


def _mlp(in_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, in_width), nn.Tanh(), nn.Linear(in_width, out_width))


def _moments(raw_BPC: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(raw_BPC, dim=-1, keepdim=True)
    return mean, (variance + _EPS).sqrt()


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error)
