"""The tiny pipeline: the same for a seed, stock on disk, with prompts of a few tokens."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLProcessor
from transformers.video_processing_utils import BaseVideoProcessor

from mixres.models.qwen.processor import QwenImageTextProcessor, load_processor, torchvision_imports
from mixres.quickstart import data as demo
from support.tiny_pipeline import write_tiny_pipeline

INSTRUCTIONS = demo.PROMPTS


def files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file() and file.name != "demo.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def test_one_seed_is_one_pipeline(tiny_base: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    torch.rand(1)  # what was drawn before does not matter
    write_tiny_pipeline(tmp_path / "same", INSTRUCTIONS)
    write_tiny_pipeline(tmp_path / "other", INSTRUCTIONS, seed=1)
    torch.set_rng_state(state)
    assert files(tmp_path / "same") == files(tiny_base)
    differing = {name for name, content in files(tmp_path / "other").items() if content != files(tiny_base)[name]}
    assert {Path(name).parts[0] for name in differing} == {"vae", "text_encoder", "transformer"}


def test_global_random_state_is_kept(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    write_tiny_pipeline(tmp_path, INSTRUCTIONS)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_folder_is_stock(tiny_base: Path) -> None:
    index = json.loads((tiny_base / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "QwenImageEditPipeline"
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]
    for name, content in files(tiny_base).items():
        assert Path(name).suffix in (".safetensors", ".json"), name
        assert b"QwenImageTextProcessor" not in content, name
        assert b"mixres" not in content, name


def test_the_stock_parts_of_the_processor_load(tiny_base: Path) -> None:
    """What `Qwen2VLProcessor.from_pretrained` reads, part by part: the whole of it needs torchvision."""
    folder = tiny_base / "processor"
    ours = load_processor(folder)
    assert isinstance(ours, Qwen2VLProcessor if torchvision_imports() else QwenImageTextProcessor)
    assert AutoImageProcessor.from_pretrained(folder).to_dict() == ours.image_processor.to_dict()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == ours.tokenizer.get_vocab()
    video, _ = BaseVideoProcessor.get_video_processor_dict(folder)
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"


def test_the_older_layout_of_a_processor_loads_too(tiny_base: Path, tmp_path: Path) -> None:
    """Qwen/Qwen-Image-Edit keeps the image processor in `preprocessor_config.json`."""
    for name, content in files(tiny_base / "processor").items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config["image_processor"]), encoding="utf-8")
    expected = load_processor(tiny_base / "processor")
    image = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")
    text = "<|vision_start|><|image_pad|><|vision_end|>swap red and blue"
    older, newer = (processor(text=[text], images=image) for processor in (load_processor(tmp_path), expected))
    assert older["input_ids"] == newer["input_ids"]
    assert (older["pixel_values"] == newer["pixel_values"]).all()


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_the_pipeline_drops_the_template_and_keeps_a_short_prompt(tiny_base: Path, text: str) -> None:
    pipeline = QwenImageEditPipeline(None, None, None, None, None, None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base / "tokenizer")
    ids = tokenizer(pipeline.prompt_template_encode.format(text)).input_ids
    kept = pipeline.prompt_template_encode_start_idx
    assert tokenizer.decode(ids[:kept]).endswith("<|im_end|>\n<|im_start|>user\n")
    assert tokenizer.decode(ids[kept:]).startswith(f"<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>")
    assert len(ids) - kept <= 16


def test_latents_of_a_photograph_have_about_unit_size(tiny_base: Path, demo_data: Path) -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(tiny_base, subfolder="vae")
    pipeline = QwenImageEditPipeline(None, vae, None, None, None, None)
    sizes = []
    for file in sorted((demo_data / "control_images").iterdir())[:6]:
        with Image.open(file) as image, torch.no_grad():
            pixels = pipeline.image_processor.preprocess(image.resize((96, 96))).unsqueeze(2)
            sizes.append(pipeline._encode_vae_image(pixels, generator=None).square().mean().sqrt())
    assert 0.3 < torch.stack(sizes).mean() < 3
