"""The layers of the Z-Image transformer by name: what LoRA targets, what is not quantised, what ComfyUI calls them."""

# Of all blocks, those of the refiners among them.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_ENDS = ("adaLN_modulation.0", "adaLN_modulation.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1",
         "all_x_embedder.2-1", "all_final_layer.2-1.linear")  # fmt: skip
LORA_PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": (*ATTENTION, *_MLP),
    "all": (*ATTENTION, *_MLP, *_ENDS),
}
# Modules with linear layers that are in no repeated block.
QUANTIZE_EXCLUSIONS = ("t_embedder", "cap_embedder", "all_x_embedder", "all_final_layer")
# ComfyUI looks up the names of diffusers behind this prefix, and slices of its fused layer for the queries, keys and
# values; a whole transformer in diffusers' layout it converts by the same table. Source (facts, no code):
# Comfy-Org/ComfyUI, `z_image_to_diffusers` in comfy/utils.py at 09708ea.
COMFYUI_PREFIX = "diffusion_model"
