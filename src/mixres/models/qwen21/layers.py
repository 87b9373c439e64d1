"""The layers of the Qwen-Image-2.1 transformer by name: what LoRA targets, what is not quantised, ComfyUI's prefix."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_MLP = ("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out")
_ENDS = ("modulation.1", "timestep_embedder.linear_1", "timestep_embedder.linear_2", "img_in", "txt_in.in_layer",
         "txt_in.out_layer", "norm_out.linear", "proj_out")  # fmt: skip
LORA_PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": (*ATTENTION, *_MLP),
    "all": (*ATTENTION, *_MLP, *_ENDS),
}
# Modules with linear layers that are in no repeated block.
QUANTIZE_EXCLUSIONS = ("time_text_embed", "modulation", "img_in", "txt_in", "norm_out", "proj_out")
# ComfyUI has the names of diffusers behind this prefix, by which it finds the layers of every model; diffusers reads
# them too. It recognises the transformer by `txt_in.text_norm` and `modulation.1`. Source (facts, no code):
# Comfy-Org/ComfyUI, pull request 16400.
COMFYUI_PREFIX = "diffusion_model"
