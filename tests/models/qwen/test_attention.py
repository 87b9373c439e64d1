"""The joint mask hides exactly the padding, is absent where there is none, and backends reach the processors."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from mixres.models.attention import JointRotary, takes_varlen
from mixres.models.qwen.attention import QwenDoubleStreamAttnProcessor2_0_MultiRes
from mixres.models.qwen_multi_resolution_patch import patch_qwen_model_for_multi_resolution
from support import mixes
from support.kinds import KINDS

EQUAL = mixes.make_mix([[(1, 6, 8)]] * 2, [9, 9])


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    """`set_attention_backend` changes the backend of the whole process."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def rotary_of(model: QwenImageTransformer2DModel, **call: Any) -> JointRotary:
    """What reaches the blocks."""
    seen: list[JointRotary] = []

    def look(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert kwargs["encoder_hidden_states_mask"] is None
        seen.append(kwargs["image_rotary_emb"])

    hook = model.transformer_blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    model(**call)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("extra", [0, 5])
def test_junk_in_padded_slots_changes_nothing(zero_cond_t: bool, extra: int) -> None:
    mix, model = mixes.random_mix(3), mixes.patched_model(zero_cond_t, mixes.EVERY_LINEAR)
    results = []
    for value in (0.0, 1e3, -1e3):
        outputs = mixes.forward_padded(model, mix, **mixes.padded_call(mix, image=extra, text=extra, value=value))
        results.append(mixes.backward(model, outputs, mixes.loss(outputs, mix)))
    mixes.assert_identical(results[1], results[0])
    mixes.assert_identical(results[2], results[0])
    mixes.assert_same(results[0], mixes.alone("random 3", zero_cond_t))


def test_no_mask_where_nothing_is_padded() -> None:
    model = mixes.patched_model()
    call = mixes.padded_call(EQUAL)  # with a text mask that is all True
    assert rotary_of(model, **call).mask is None
    explicit = {"attention_kwargs": {"attention_mask": torch.ones(2, 57)}}
    assert rotary_of(model, **{**call, "encoder_hidden_states_mask": None}, **explicit).mask is None
    other_sizes = mixes.make_mix([[(1, 6, 8)], [(1, 8, 6)]], [9, 9])  # of equal length
    assert rotary_of(model, **mixes.padded_call(other_sizes)).mask is None
    mixes.assert_same(mixes.run(model, other_sizes, "padded"), mixes.run(mixes.stock_model(), other_sizes, "alone"))
    pre = mixes.precomputed_call(EQUAL)
    assert rotary_of(model, **pre).mask is None


def test_processor_alone_equals_the_stock_one() -> None:
    attn, noise = mixes.stock_model().transformer_blocks[0].attn, torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 6, 64, generator=noise), torch.randn(2, 4, 64, generator=noise)
    freqs = mixes.stock_model().pos_embed([[(1, 2, 3)]], max_txt_seq_len=4, device=torch.device("cpu"))
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    ours, stock = QwenDoubleStreamAttnProcessor2_0_MultiRes(), QwenDoubleStreamAttnProcessor2_0()
    for text_mask in (None, mask):
        for rotary in (None, freqs):
            kwargs = {"encoder_hidden_states_mask": text_mask, "image_rotary_emb": rotary}
            pairs = zip(ours(attn, image, text, **kwargs), stock(attn, image, text, **kwargs), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    joint = torch.cat([mask, torch.ones(2, 6, dtype=torch.bool)], dim=1)
    expected = stock(attn, image, text, mask, None, freqs)
    for explicit in (joint, joint[:, None, None], joint.long()):
        found = ours(attn, image, text, None, explicit, freqs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    per_sample = (freqs[0].expand(2, -1, -1), freqs[1])
    assert torch.equal(ours(attn, image, text, mask, None, per_sample)[0], expected[0])
    with pytest.raises(ValueError, match="the text stream"):
        ours(attn, image)


@pytest.mark.parametrize("patched_first", [True, False])
def test_attention_backend_reaches_the_processors(patched_first: bool) -> None:
    """Chosen before the patch or after it."""
    model = mixes.patched_model() if patched_first else mixes.stock_model()
    model.set_attention_backend("_native_math")
    patch_qwen_model_for_multi_resolution(model)
    processors = {block.attn.processor._attention_backend for block in model.transformer_blocks}
    assert processors == {AttentionBackendName._NATIVE_MATH}


def test_every_backend_that_a_cpu_reaches_is_right_or_refuses() -> None:
    """Some take no mask and raise an error; none may answer with other values."""
    right = set()
    for backend in AttentionBackendName:
        model = mixes.patched_model(False, mixes.EVERY_LINEAR)
        if "hub" in backend.value:  # these are fetched when they are chosen
            continue
        try:
            model.set_attention_backend(backend.value)
        except (ImportError, RuntimeError):  # a package or a device that is not here
            continue
        for layout in mixes.LAYOUTS:
            try:
                found = mixes.run(model, mixes.random_mix(3), layout)
            except (AttributeError, NotImplementedError, RuntimeError, UserWarning, ValueError):
                continue
            mixes.assert_same(found, mixes.alone("random 3", False))
            right.add((backend.value, layout))
    assert {(name, layout) for name in ("native", "_native_math") for layout in mixes.LAYOUTS} <= right


VARLEN = [name for name in AttentionBackendName if "varlen" in name.value]


@pytest.mark.parametrize("backend", [*VARLEN, "flash_varlen", "of the process"])
def test_varlen_backends_never_see_a_padded_mask(backend: AttentionBackendName | str) -> None:
    model = mixes.patched_model()
    if backend == "of the process":
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.FLASH_VARLEN)
    else:
        for block in model.transformer_blocks:
            block.attn.processor._attention_backend = backend
    with pytest.raises(ValueError, match=r"varlen.*' keeps the wrong keys of a padded batch: use batch\.layout packed"):
        model(**mixes.padded_call(mixes.random_mix(3)))


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "taken"),
    [
        (torch.bfloat16, 128, (8, 0), True),
        (torch.float16, 256, (9, 0), True),
        (torch.float16, 128, (7, 5), False),  # Turing has no such kernel
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 100, (9, 0), False),
        (torch.float32, 128, (9, 0), False),
    ],
)
def test_the_varlen_kernel_gets_only_what_card_and_kernel_can_take(
    dtype: torch.dtype, width: int, capability: tuple[int, int], taken: bool
) -> None:
    """All else goes one call per sample."""
    assert takes_varlen(dtype, head_width=width, capability=capability) == taken


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen", "qwen zero_cond_t", "qwen21"])
def test_varlen_kernel_equals_one_attention_call_per_sample(dtype: torch.dtype, name: str) -> None:
    """The kernel of all samples is as near to fp32 as one call per sample is, and runs under autocast too."""
    kind = KINDS[name]
    reference, mix = kind.alone("main"), kind.mix("main").to("cuda", dtype)
    model, wide = kind.patched(adapters=True).to("cuda"), kind.mix("main").to("cuda", torch.float32)
    with torch.no_grad(), torch.autocast("cuda", dtype):
        cast = [x.float().cpu() for x in kind.forward(model, wide, "packed")]
    model.to(dtype)
    fused = kind.run(model, mix, "packed")
    model.set_attention_backend("_native_math")
    single = kind.run(model, mix, "packed")
    assert mixes.forward_error(fused, reference) <= 1.5 * mixes.forward_error(single, reference)
    assert mixes.gradient_error(fused, reference) <= 1.5 * mixes.gradient_error(single, reference)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(cast, reference.outputs, strict=True)) < 2e-2
