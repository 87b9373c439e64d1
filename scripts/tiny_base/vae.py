"""A small `AutoencoderKLQwenImage` that reconstructs photographs: its encoder is written down, its decoder trained.

The encoder is the principal components (PCA) of 4 x 4 pixel patches. All residual branches are zero, so its trunk is
linear: strided convolutions take patches apart and project them. Before the last normalisation and SiLU stand the 16
components, their negatives and one large constant: the constant makes the normalisation nearly a constant factor, and
`silu(x) - silu(-x) = x` undoes the activation.

The decoder is trained in two phases: first its linear trunk alone, then all of it from there, with noise on the
latents, because a transformer's latents are never exact.

Cost: about five minutes on two cores. Result: 38.9 dB on photographs never seen.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from photographs import Augmentation, Crops, psnr
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

CHANNELS = 16
BASE_DIM = 16
SIDE = 4  # pixels of a latent cell
TRUNK_STEPS, STEPS = 300, 3000
_BATCH, _CROP = 8, 64
_ENCODER_CONSTANT = 300.0  # far above any component, so that the norm hardly depends on them
_DECODER_CONSTANT = 6.0
_LOG_VARIANCE = -14.0
_LATENT_NOISE = 0.03
_COLOURS = Augmentation(permuted=0.35, inverted=0.12, scaled=0.28, tinted=0.1)


def train_vae(
    seed: int, held_out: Sequence[Tensor], *, trunk_steps: int = TRUNK_STEPS, steps: int = STEPS
) -> AutoencoderKLQwenImage:
    """The trained VAE; `held_out` crops `(3, H, W)` only show how it comes along."""
    torch.manual_seed(seed)
    crops = Crops(seed, _COLOURS)
    vae = AutoencoderKLQwenImage(
        base_dim=BASE_DIM, z_dim=CHANNELS, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True]
    ).eval()
    vae.requires_grad_(False)
    projection = write_encoder(vae, crops.batch(384, _CROP, _CROP))
    with _without_time(vae.decoder):
        _flatten_branches(vae.decoder)
        vae.decoder.requires_grad_(True)
        _train_trunk(vae, crops, projection, trunk_steps)
        _write_head(vae.decoder)
        _train_decoder(vae, crops, projection, steps, held_out)
    return vae.requires_grad_(False)


class Projection:
    """What the encoder computes, as one strided convolution: 16 times faster, for training the decoder."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, images: Tensor) -> Tensor:
        """Latents `(B, 16, 1, H / 4, W / 4)` of images `(B, 3, H, W)` in [0, 1]."""
        return functional.conv2d(images * 2 - 1, self.weight, self.bias, stride=SIDE).unsqueeze(2)


@torch.no_grad()
def write_encoder(vae: AutoencoderKLQwenImage, images: Tensor) -> Projection:
    """Writes the PCA of `images` (B, 3, H, W) into the encoder and the latents' statistics into the config."""
    mean, components, deviations = _principal_components(_cells(images * 2 - 1), CHANNELS)
    # Unit variance; rounded as the file will round it, so that the decoder learns from the very latents it will get.
    matrix = (components / deviations[:, None]).bfloat16().float()
    bias = -(matrix @ mean).bfloat16().float()
    encoder = vae.encoder
    for name, parameter in encoder.named_parameters():
        if not name.endswith("gamma"):
            parameter.zero_()
    first, second = (block.resample[1] for block in encoder.down_blocks if hasattr(block, "resample"))
    _identity(encoder.conv_in, 3)
    _space_to_depth(first, torch.eye(12))
    _identity(encoder.down_blocks[2].conv_shortcut, 12)
    _space_to_depth(second, matrix)
    second.bias[:CHANNELS] = bias
    signs = encoder.down_blocks[4].conv_shortcut
    for channel in range(CHANNELS):
        signs.weight[channel, channel] = 1
        signs.weight[CHANNELS + channel, channel] = -1
    signs.bias[2 * CHANNELS] = _ENCODER_CONSTANT
    width = encoder.norm_out.gamma.numel()
    encoder.norm_out.gamma.fill_(_ENCODER_CONSTANT / math.sqrt(width))
    for channel in range(CHANNELS):
        encoder.conv_out.weight[channel, channel, -1, 1, 1] = 1
        encoder.conv_out.weight[channel, CHANNELS + channel, -1, 1, 1] = -1
    encoder.conv_out.bias[CHANNELS:] = _LOG_VARIANCE
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.zero_()
        conv.bias.zero_()
        _identity(conv, conv.weight.shape[0])
    # Components that change pixels more are given more weight, by the root of their deviation: between the raw
    # components, of which the first drowns all others, and whitened ones, which treat noise like structure.
    scale = (deviations / deviations[0]).sqrt()
    scale = scale / scale.square().mean().sqrt()
    vae.register_to_config(latents_mean=[0.0] * CHANNELS, latents_std=[round(1 / float(x), 4) for x in scale])
    # (dy1, dx1, dy0, dx0, c) with y = 2 dy1 + dy0: the order in which two space-to-depth steps nest.
    kernel = matrix.view(CHANNELS, 2, 2, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(CHANNELS, 3, SIDE, SIDE)
    return Projection(kernel.contiguous(), bias)


def _cells(images: Tensor) -> Tensor:
    """`(N, 48)`: the pixels of each cell, in the order of two nested space-to-depth steps."""
    for _ in range(2):
        images = torch.cat([images[:, :, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)], 1)
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `(D,)`, the first `count` components `(count, D)` and their standard deviations `(count,)`."""
    mean = rows.mean(0)
    centred = (rows - mean).double()
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    order = variances.argsort(descending=True)[:count]
    components = vectors[:, order].T
    # An eigenvector's sign is arbitrary: a positive sum makes it the same on every machine.
    components = components * torch.where(components.sum(1, keepdim=True) < 0, -1.0, 1.0)
    return mean, components.float(), variances[order].sqrt().float()


def _identity(conv: nn.Module, channels: int) -> None:
    middle = tuple(side // 2 for side in conv.weight.shape[3:])
    for channel in range(channels):
        conv.weight[(channel, channel, -1, *middle)] = 1


def _space_to_depth(conv: nn.Module, matrix: Tensor) -> None:
    """A 3 x 3 convolution of stride 2 as `matrix` (outputs, 4 x inputs) on 2 x 2 pixels, in (dy, dx, channel) order."""
    inputs = matrix.shape[1] // 4
    for index, (dy, dx) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        conv.weight[: matrix.shape[0], :inputs, dy, dx] = matrix[:, index * inputs : (index + 1) * inputs]


@torch.no_grad()
def _flatten_branches(decoder: nn.Module) -> None:
    for module in decoder.modules():
        for name in ("conv2", "proj"):
            if conv := getattr(module, name, None):
                conv.weight.zero_()
                conv.bias.zero_()


class _Shortcut(nn.Module):
    """Stands for a residual block whose branch is zero."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv_shortcut = getattr(block, "conv_shortcut", nn.Identity())

    def forward(self, hidden: Tensor, *caches: Any) -> Tensor:
        shortcut: Tensor = self.conv_shortcut(hidden)
        return shortcut


def _train_trunk(vae: AutoencoderKLQwenImage, crops: Crops, projection: Projection, steps: int) -> None:
    """Phase 1: convolutions and shortcuts alone; the first three channels of the last block are the image."""
    decoder = vae.decoder
    trunk = [decoder.conv_in]
    for block in decoder.up_blocks:
        trunk += [_Shortcut(resnet) for resnet in block.resnets] + list(block.upsamplers or ())
    layers = nn.ModuleList(trunk)

    def decode(latents: Tensor) -> Tensor:
        for layer in layers:
            latents = layer(latents)
        return (latents[:, :3, 0] + 1) / 2

    parameters = [p for name, p in layers.named_parameters() if "time_conv" not in name]
    _descend(parameters, decode, crops, projection, steps=steps, rate=5e-3, label="VAE trunk")


@torch.no_grad()
def _write_head(decoder: nn.Module) -> None:
    """The last normalisation, SiLU and convolution so that they begin as the identity on the linear image."""
    up = decoder.up_blocks[-2].upsamplers[0].resample[1]
    assert all(isinstance(block.conv_shortcut, nn.Identity) for block in decoder.up_blocks[-1].resnets)
    up.weight[3:6], up.bias[3:6] = -up.weight[:3], -up.bias[:3]
    up.weight[-1], up.bias[-1] = 0, _DECODER_CONSTANT
    up.weight[6:-1].mul_(0.3)
    decoder.conv_out.weight.zero_()
    decoder.conv_out.bias.zero_()
    for channel in range(3):
        decoder.conv_out.weight[channel, channel, -1, 1, 1] = 1
        decoder.conv_out.weight[channel, 3 + channel, -1, 1, 1] = -1
    # 3 % more than the constant: what the other channels add to the norm.
    decoder.norm_out.gamma.fill_(1.03 * _DECODER_CONSTANT / math.sqrt(decoder.norm_out.gamma.numel()))


def _train_decoder(
    vae: AutoencoderKLQwenImage, crops: Crops, projection: Projection, steps: int, held_out: Sequence[Tensor]
) -> None:
    """Phase 2: all of the decoder."""

    def decode(latents: Tensor) -> Tensor:
        image: Tensor = vae.decoder(latents)[:, :, 0]
        return (image + 1) / 2

    @torch.no_grad()
    def score() -> str:
        scores = [psnr(decode(projection(crop[None]))[0], crop) for crop in held_out]
        return f"{sum(scores) / len(scores):.2f} dB"

    _descend(
        list(vae.decoder.parameters()), decode, crops, projection, steps=steps, rate=2e-3, label="VAE", score=score
    )


def _descend(
    parameters: Iterable[Tensor],
    decode: Callable[[Tensor], Tensor],
    crops: Crops,
    projection: Projection,
    *,
    steps: int,
    rate: float,
    label: str,
    score: Callable[[], str] | None = None,
) -> None:
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.98))
    with tqdm(range(steps), desc=label, unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 50) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
            images = crops.batch(_BATCH, _CROP, _CROP)
            latents = projection(images)
            if score:
                latents = latents + _LATENT_NOISE * torch.rand(_BATCH, 1, 1, 1, 1) * torch.randn_like(latents)
            optimizer.zero_grad(set_to_none=True)
            _difference(decode(latents), images).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0 if score is None else 0.5)
            optimizer.step()
            if score and (step + 1) % 200 == 0:
                bar.set_postfix_str(score())


def _difference(images: Tensor, targets: Tensor) -> Tensor:
    """L1, squares (which the PSNR counts) and L1 of the gradients (which sharpness needs)."""
    error = images - targets
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return error.abs().mean() + 5 * error.square().mean() + 0.2 * (across.abs().mean() + down.abs().mean())


@contextmanager
def _without_time(decoder: nn.Module) -> Iterator[None]:
    """Within it causal convolutions have one tap in time: an image has one frame, so the others see only padding.

    Afterwards the others are there again, as zeros, and so is what only films use: it compresses to nothing.
    """
    causal = [module for module in decoder.modules() if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3]
    paddings = [module._padding for module in causal]
    for module in causal:
        module.weight = nn.Parameter(module.weight[:, :, -1:].detach().clone())
        module._padding = (*module._padding[:4], 0, 0)
    yield
    with torch.no_grad():
        for module, padding in zip(causal, paddings, strict=True):
            module.weight = nn.Parameter(functional.pad(module.weight, (0, 0, 0, 0, 2, 0)))
            module._padding = padding
        for name, parameter in decoder.named_parameters():
            if "time_conv" in name:
                parameter.zero_()
