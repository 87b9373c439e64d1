"""The layers of the Qwen-Image transformer by name: what LoRA targets, what is not quantised, what trains nothing."""

from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
_ENDS = ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "img_in", "txt_in", "norm_out.linear", "proj_out")
LORA_PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": (*ATTENTION, *_MLP),
    "all": (*ATTENTION, *_MLP, "img_mod.1", "txt_mod.1", *_ENDS),
}
# Modules with linear layers that are in no repeated block.
QUANTIZE_EXCLUSIONS = ("time_text_embed", "img_in", "txt_in", "norm_out", "proj_out")
# ComfyUI's own names are those of diffusers, behind this prefix; diffusers reads them too. With `transformer` in its
# place ComfyUI would read the LoRA and diffusers would not. Source (facts, no code): Comfy-Org/ComfyUI, comfy/lora.py
# at 17358c8f73b5 (`model_lora_keys_unet`), comfy/model_detection.py at 0b61ce5baa9e: a transformer is recognised by
# `txt_norm.weight`, and one with `zero_cond_t` by an empty tensor.
COMFYUI_PREFIX = "diffusion_model"
COMFYUI_ZERO_COND_T = "__index_timestep_zero__"


def untrained_modules(transformer: nn.Module) -> tuple[str, ...]:
    """The last block's text stream, which ends there but for its keys and values.

    Trained, these modules would get no gradient or zeros, and data-parallel wrappers would wait for them in vain.
    """
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"  # type: ignore[arg-type]
    return tuple(f"{last}.{name}" for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp"))
