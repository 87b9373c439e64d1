"""The layers of the FLUX.1 transformer by name: what LoRA targets, what is not quantised, what ComfyUI calls them."""

# The first three are those of both kinds of block.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_DOUBLE_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
# The output of a single-stream block, of attention and feed-forward together; the transformer's own has this name too.
_SINGLE_OUT = "single_transformer_blocks.*.proj_out"
_MODULATIONS = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
_ENDS = ("time_text_embed.*.linear_1", "time_text_embed.*.linear_2", "x_embedder", "context_embedder", "proj_out")
LORA_PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": (*ATTENTION, *_DOUBLE_MLP, "proj_mlp", _SINGLE_OUT),
    "all": (*ATTENTION, *_DOUBLE_MLP, "proj_mlp", *_MODULATIONS, *_ENDS),
}
# Modules with linear layers that are in no repeated block. `proj_out` alone would name those of the single blocks
# too, a seventh of all weights. torchao knows a layer by its weight; bitsandbytes does not, and quantises this one too.
QUANTIZE_EXCLUSIONS = ("time_text_embed", "x_embedder", "context_embedder", "norm_out", "proj_out.weight")
# ComfyUI looks up the names of diffusers behind this prefix, and slices of its fused layers for the queries, keys and
# values; diffusers reads nothing behind `diffusion_model`. Source (facts, no code): Comfy-Org/ComfyUI, comfy/lora.py at
# 17358c8f73b5 and comfy/utils.py at 09708ea.
COMFYUI_PREFIX = "transformer"
