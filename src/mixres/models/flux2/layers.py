"""The layers of the FLUX.2 transformer by name: what LoRA targets, what is not quantised, what ComfyUI calls them."""

_DOUBLE = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# In the single-stream blocks attention and feed-forward share their layers; without them most blocks stay untouched.
ATTENTION = (*_DOUBLE, "attn.to_qkv_mlp_proj", "attn.to_out")
_MLP = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
# Of the embedders of timestep and, where there is one, guidance; and the layers before and behind the blocks.
_ENDS = ("linear_1", "linear_2", "x_embedder", "context_embedder", "norm_out.linear", "proj_out")
LORA_PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": (*ATTENTION, *_MLP),
    "all": (*ATTENTION, *_MLP, *(f"{name}.linear" for name in _MODULATIONS), *_ENDS),
}
# Modules with linear layers that are in no repeated block.
QUANTIZE_EXCLUSIONS = ("time_guidance_embed", *_MODULATIONS, "x_embedder", "context_embedder", "norm_out", "proj_out")
# ComfyUI looks up the names of diffusers behind this prefix, and slices of its fused layers for the queries, keys and
# values. Source (facts, no code): Comfy-Org/ComfyUI, comfy/lora.py at 17358c8f73b5 and comfy/utils.py at 09708ea.
COMFYUI_PREFIX = "transformer"
# It does not look up these by the names of diffusers, but every layer by its own.
_COMFYUI_OWN = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in_out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in_out_layer",
    **{f"{name}.linear": f"{name}_lin" for name in _MODULATIONS},
}
COMFYUI_NAMES = {layer: f"lora_unet_{name}" for layer, name in _COMFYUI_OWN.items()}
