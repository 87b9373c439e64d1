"""What can be typed behind `train.py` and `mixres`: the verbs, their options, and what each way of ending means.

Promise: nothing is imported, so that `--help` costs nothing.
"""

VERBS = {
    "train": "fill the cache where it is not full, then train (also where no verb is given)",
    "cache": "encode every sample of the configuration into the cache, then stop (--verify: check the entries there)",
    "inspect": "show problems, sizes, tokens, plan, memory of the run to come, before any of it (--measure, --ranks N)",
    "verify": "compare a batch of different sizes with its samples alone, on this model, data and device",
    "bench": "time the ways to batch the same samples (--synthetic: random weights and samples of this model's shape)",
}
# Verbs with options of their own, which come behind them: name, its value (None: a switch), meaning. All are text here;
# the verb checks them, together with what they name.
OWN_VERBS = {
    "sample": "make pictures with what a run has trained (its options: sample --help)",
    "export": "write what a run has trained for diffusers or ComfyUI (its options: export --help)",
}
REPEATED = ("--image",)
OWN_OPTIONS = {
    "sample": (
        ("--lora", "RUN|FILE", "what was trained: a run folder, its ema/, or a .safetensors file"),
        ("--image", "FILE", "an image to be edited; once for each, in their order"),
        ("--prompt", "TEXT", "what is to be made"),
        ("--prompts", "FILE", "instead of both: JSON lines with prompt, path_control, ..., also seed and size"),
        ("--out", "DIR", "the folder for the pictures; they are numbered on behind those that are there"),
        ("--size", "WxH", "pixels of the pictures (the stock pipeline's: 1024 x 1024 in area, as the last image)"),
        ("--steps", "N", "denoising steps (20)"),
        ("--seed", "N", "seed of the noise (0)"),
        ("--guidance", "G", "strength of guidance, the stock pipelines' true_cfg_scale (1: none)"),
        ("--negative-prompt", "TEXT", "what guidance leads away from (' ')"),
        ("--compare", None, "also without what was trained, and sheets of both side by side"),
        ("--base", "PATH", "the base, where it is no longer where the run had it"),
        ("--device", "NAME", "cuda, cuda:1, cpu (cuda where there is one)"),
        ("--dtype", "NAME", "bfloat16 or float32 (float32 on a CPU)"),
        ("--quantize", "NAME", "null, int8, fp8, nf4 or bnb_int8: the base under a LoRA (as it was trained)"),
    ),
    "export": (
        ("run", "RUN|FILE", "what was trained: a run folder, its ema/, one of its checkpoints/, a .safetensors file"),
        ("--format", "NAME", "diffusers or comfyui: whose names the file is to have"),
        ("--merge", None, "the base's weights with the LoRA in them instead of the LoRA"),
        ("--out", "FILE", "where to, a .safetensors file; a folder for diffusers with --merge"),
        ("--base", "PATH", "to merge: the base, where it is no longer where the run had it"),
    ),
}
OPTIONS_OF = {  # that a verb alone has
    "cache": ("verify",),
    "bench": ("synthetic",),
    "inspect": ("measure", "decode", "ranks"),
}
OPTIONS = ("--config", "--cache", *(f"--{o}" for of in OPTIONS_OF.values() for o in of), "--help", "--version")

EXIT_CODES = (
    "exit codes: 0 done, 1 failed at work, 2 wrong input (all problems are listed), 75 stopped by a signal after saving"
    " (run the same command to go on), 130 or 143 interrupted"
)
