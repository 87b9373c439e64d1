"""The tiny base's transformer as it begins: random, but for three hints that save most of the training.

The modulation is small and its gates are open, so that all blocks take part from the first step. Half of the heads
begin by looking from each target token at the control token in the same place, as a trained one ends up doing: their
queries and keys are nearly constant, and rotary positions turn equal vectors into attention by distance. The other half
begin by looking from every image token at the text: among hundreds of image tokens the one word that tells two
prompts apart would go unheard.
"""

import math

import torch
from diffusers import QwenImageTransformer2DModel

LAYERS, HEADS, HEAD_WIDTH = 5, 4, 32
AXES = (8, 12, 12)  # channels of a head that are rotated by frame, row, column
TEXT_WIDTH = 64
# Fractions of a query's energy in the first frequencies of each axis: (axis, frequency, fraction). They fall by
# distance fast enough to single out a token, and the second frequency keeps the first from coming round again.
_ENERGY = ((0, 0, 0.2), (1, 0, 0.28), (1, 1, 0.12), (2, 0, 0.28), (2, 1, 0.12))
_SHARPNESS = 2.5  # weight of the query and key norms
_GATE = 0.5
_TEXT_PULL = 0.7  # about as large as the random rest of a query or key


@torch.no_grad()
def initial_transformer(seed: int) -> QwenImageTransformer2DModel:
    """3.08 million parameters, float32."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=AXES,
    )
    query, key = _same_place()
    word = _anywhere()
    half = HEADS // 2 * HEAD_WIDTH
    for block in transformer.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            modulation.weight.mul_(0.1)
            modulation.bias.zero_()
            for gate in modulation.bias.chunk(6)[2::3]:  # shift, scale, gate of attention; the same of the MLP
                gate.fill_(_GATE)
        for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_k):
            norm.weight.fill_(_SHARPNESS)
        for layer, vector in ((block.attn.to_q, query), (block.attn.to_k, key)):
            layer.weight[:half].mul_(0.05)
            layer.bias[:half] = vector.repeat(HEADS // 2)
        for layer in (block.attn.to_q, block.attn.add_k_proj):
            layer.weight[half:].mul_(0.3)
            layer.bias[half:] = word.repeat(HEADS - HEADS // 2)
    return transformer


def _anywhere() -> torch.Tensor:
    """A vector `(HEAD_WIDTH,)` of the slowest frequencies, which no position turns by much."""
    amplitude = torch.zeros(HEAD_WIDTH // 2)
    for last in (AXES[0] // 2, (AXES[0] + AXES[1]) // 2, HEAD_WIDTH // 2):
        amplitude[last - 1] = _TEXT_PULL
    return torch.view_as_real(torch.polar(amplitude, torch.zeros_like(amplitude))).flatten()


def _same_place() -> tuple[torch.Tensor, torch.Tensor]:
    """A query and a key `(HEAD_WIDTH,)` whose rotated product is largest one frame on, in the same row and column."""
    starts = (0, AXES[0] // 2, (AXES[0] + AXES[1]) // 2)
    amplitude, phase = torch.zeros(HEAD_WIDTH // 2), torch.zeros(HEAD_WIDTH // 2)
    for axis, frequency, fraction in _ENERGY:
        amplitude[starts[axis] + frequency] = math.sqrt(fraction * HEAD_WIDTH)
    phase[0] = 1.0  # the first frequency turns one radian a frame: the target is frame 0, its control frame 1
    query = torch.polar(amplitude, phase)
    key = torch.polar(amplitude, torch.zeros_like(phase))
    return torch.view_as_real(query).flatten(), torch.view_as_real(key).flatten()
