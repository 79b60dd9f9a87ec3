"""The faults: what somebody could plausibly get wrong, and the tests that must see it."""

from typing import NamedTuple


class Fault(NamedTuple):
    """Replace `old`, which occurs once in `file`, by `new`; `tests` must fail.

    `tests` are pytest arguments: the narrowest tests that ought to notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


KERNELS = "artemis_kernels"
CORE = f"{KERNELS}/core"
LOW_RANK = f"{KERNELS}/ops/low_rank"
PACKED = f"{KERNELS}/ops/packed"

BOTTLENECK = f"{KERNELS}/ops/bottleneck_adapter"
JOINT = "tests/kernels/test_weight_gradients.py"

LORA_DROPOUT = "tests/ops/test_lora_linear.py::test_dropout"
FEW_ROWS = "tests/core/test_quantized.py::test_few_rows_of_bf16"
SAME_MASK = "tests/ops/test_dropout.py::test_the_mask_used_is_the_mask_shown"

CROSS_ENTROPY = "tests/ops/test_cross_entropy.py"

LOSS = (
    Fault(
        "a later block of a row not rescaled, C",
        f"{CORE}/native/cross_entropy.c",
        "sum += decay_f(LOAD(row[j]) - most)",
        "sum += decay_f(LOAD(row[j]) - largest_##SUFFIX(row + from, to - from))",
        (CROSS_ENTROPY,),
    ),
    Fault(
        "the last class of a row left out, C",
        f"{CORE}/native/cross_entropy.c",
        "int64_t to = from + COLUMNS < n ? from + COLUMNS : n;",
        "int64_t to = from + COLUMNS < n ? from + COLUMNS : n - (n % COLUMNS == 1);",
        (CROSS_ENTROPY,),
    ),
    Fault(
        "most and log_sum kept as one number, C",
        f"{CORE}/native/cross_entropy.c",
        "kept[2 * i] = most, kept[2 * i + 1] = (float)log_sum;",
        "kept[2 * i] = 0, kept[2 * i + 1] = (float)(log_sum + most);",
        (CROSS_ENTROPY, "-k", "large_logits"),
    ),
    Fault(
        "an ignored row's gradient not cleared, C",
        f"{CORE}/native/cross_entropy.c",
        "memset(to, 0, sizeof(TYPE) * (size_t)n);",
        "",
        (CROSS_ENTROPY,),
    ),
    Fault(
        "a sum not rescaled when its largest term grows, Triton",
        f"{KERNELS}/ops/cross_entropy/kernels.py",
        "total = total * tl.exp(most - base) + tl.sum(tl.exp(x - base), 0)",
        "total = total + tl.sum(tl.exp(x - base), 0)",
        (CROSS_ENTROPY,),
    ),
    Fault(
        "minus infinity minus itself, Triton",
        f"{KERNELS}/ops/cross_entropy/kernels.py",
        'base = tl.where(larger == float("-inf"), 0.0, larger)',
        "base = larger",
        (CROSS_ENTROPY, "-k", "masked_classes"),
    ),
    Fault(
        "labels not shifted",
        "artemis/training/loss.py",
        "nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]",
        "nn.functional.pad(labels, (0, 1), value=ignore_index)[..., :-1]",
        ("tests/artemis/training/test_loss.py",),
    ),
)

MASK = (
    Fault(
        "mask threshold off by one",
        f"{CORE}/rng.py",
        "return min(round(p * LANES), LANES - 1)",
        "return min(round(p * LANES) + 1, LANES - 1)",
        ("tests/core/test_rng.py",),
    ),
    Fault(
        "a lane equal to the threshold dropped, C",
        f"{CORE}/native/mask.h",
        "(h >> 16) >= threshold",
        "(h >> 16) > threshold",
        ("tests/ops/test_dropout.py", "-k", "threshold and eager"),
    ),
    Fault(
        "kept values rescaled by the nominal rate, not the drawn one",
        f"{CORE}/rng.py",
        "return LANES / (LANES - threshold(p))",
        "return 1 / (1 - p)",
        ("tests/core/test_rng.py",),
    ),
    Fault(
        "lanes of a hash swapped, torch",
        f"{CORE}/rng.py",
        "torch.stack((h & 0xFFFF, (h >> 16) & 0xFFFF), dim=-1)",
        "torch.stack(((h >> 16) & 0xFFFF, h & 0xFFFF), dim=-1)",
        ("tests/core/test_rng.py",),
    ),
    Fault(
        "second key forgotten: masks of two seeds are permutations of each other",
        f"{CORE}/rng.py",
        "h.bitwise_xor_(_shift(h, 15)).add_(k1)",
        "h.bitwise_xor_(_shift(h, 15))",
        ("tests/core/test_rng.py",),
    ),
    Fault(
        "counters beyond 32 bits draw from the first key again",
        f"{CORE}/rng.py",
        "_signed(0x9E3779B9 * (high + 1))",
        "_signed(0x9E3779B9)",
        ("tests/core/test_rng.py",),
    ),
    Fault(
        "lanes of a hash swapped, Triton, even columns",
        f"{CORE}/tiles.py",
        "tl.interleave(h & 0xFFFF, h >> 16)",
        "tl.interleave(h >> 16, h & 0xFFFF)",
        (SAME_MASK,),
    ),
    Fault(
        "lane of an element by its column, not its index, Triton, odd columns",
        f"{CORE}/tiles.py",
        "(index & 1) * 16",
        "(offs_n & 1)[None, :] * 16",
        (SAME_MASK,),
    ),
    Fault(
        "a row's pairs counted from the tile, Triton",
        f"{CORE}/tiles.py",
        "offs_pair = start_n // 2 + tl.arange(0, BLOCK_N // 2)",
        "offs_pair = tl.arange(0, BLOCK_N // 2)",
        (SAME_MASK,),
    ),
    Fault(
        "high half of the seed ignored, C",
        f"{CORE}/native/mask.h",
        "mix(seed_high ^ k0",
        "mix(k0",
        ("tests/core/test_dropped.py",),
    ),
    Fault(
        "a chunk that starts inside a pair starts at the pair, C",
        f"{CORE}/native/mask.h",
        "return buffer + odd;",
        "return buffer;",
        ("tests/core/test_dropped.py",),
    ),
)

EAGER = (
    Fault(
        "scale squared in the forward",
        f"{KERNELS}/ops/lora_linear/eager.py",
        "LowRank(_scaled(s, scale_tensor), lora_b, scale)",
        "LowRank(_scaled(s, scale_tensor), lora_b, scale * scale)",
        ("tests/ops/test_lora_linear.py::test_number_as_scale_without_bias",),
    ),
    Fault(
        "scale dropped from the gradients of x and A",
        f"{KERNELS}/ops/lora_linear/eager.py",
        "project(dy, lora_b.t(), alpha=scale)",
        "project(dy, lora_b.t())",
        ("tests/ops/test_lora_linear.py::test_number_as_scale_without_bias",),
    ),
    Fault(
        "a learned gain rounded to x's dtype",
        f"{KERNELS}/ops/lora_linear/eager.py",
        "x * scale_tensor",
        "x * scale_tensor.to(x.dtype)",
        ("tests/ops/test_contract.py::test_fp32_scale_is_not_rounded",),
    ),
    Fault(
        "low-rank part overwrites dX instead of adding to it",
        f"{CORE}/dropped.py",
        "return LowRank.added_to(dx, term)",
        "return dx.copy_(term.product(dx.dtype))",
        ("tests/ops/test_groups.py",),
    ),
    Fault(
        "gradient of x not masked",
        f"{CORE}/dropped.py",
        "    library = _passes(dx, ds.shape[1], mask, (torch.float32,))",
        "    mask, library = None, None",
        (LORA_DROPOUT,),
    ),
    Fault(
        "x saved though nothing reads it",
        f"{KERNELS}/ops/lora_linear/op.py",
        "kept_x = x if ctx.needs[1] else None",
        "kept_x = x",
        ("tests/ops/test_contract.py::test_saves_x_only_for_the_gradient_that_reads_it",),
    ),
    Fault(
        "act' missing, plain torch",
        f"{CORE}/units.py",
        "dz = ACTIVATIONS[self.activation].backward(scaled, z)",
        "dz = scaled",
        ("tests/core/test_units.py",),
    ),
    Fault(
        "act' missing, C",
        f"{CORE}/native/units.c",
        "? 0 : dh * slope[c];",
        "? 0 : dh;           ",
        ("tests/ops/test_bottleneck_adapter.py::test_activations",),
    ),
    Fault(
        "sums over rows stop after the first of several parts",
        f"{CORE}/units.py",
        "total = sums.sum(0)",
        "total = sums[0]",
        ("tests/core/test_units.py",),
    ),
    Fault(
        "the bias's unit scaled, C",
        f"{CORE}/native/units.c",
        "if (pitch > w) h[i * pitch + w] = STORE(1.0f);                                        \\",
        "if (pitch > w) h[i * pitch + w] = STORE(scale);                                       \\",
        ("tests/core/test_units.py",),
    ),
    Fault(
        "derivative of the exact gelu for its tanh form",
        f"{CORE}/activations.py",
        'aten.gelu_backward(dh, z, approximate="tanh")',
        "aten.gelu_backward(dh, z)",
        ("tests/core/test_activations.py",),
    ),
    Fault(
        "dropout missing from h in the gradient of up",
        f"{CORE}/native/units.c",
        " " * 28 + "value[c] = factor[c] > 0 ? value[c] * factor[c] : 0;",
        " " * 28 + "value[c] = value[c] * 1.0f;",
        ("tests/ops/test_bottleneck_adapter.py::test_dropout",),
    ),
    Fault(
        "gradient of x without the residual's",
        f"{KERNELS}/ops/bottleneck_adapter/eager.py",
        "through.plus(dy) if residual_is_x else",
        "through.product(dy.dtype) if residual_is_x else",
        ("tests/ops/test_bottleneck_adapter.py::test_residual_is_x",),
    ),
    Fault(
        "folded dD through W without the bias's term",
        f"{KERNELS}/ops/adapter_linear/eager.py",
        "            if bias is not None:\n                ddown.addr_",
        "            if False:\n                ddown.addr_",
        ("tests/ops/test_adapter_linear.py::test_folded_equals_plain_in_fp64",),
    ),
    Fault(
        "base's bias skipped in the folded pre-activation",
        f"{KERNELS}/ops/adapter_linear/eager.py",
        "project(x, f, folded_bias(down, bias, bias_down))",
        "project(x, f, bias_down)",
        ("tests/ops/test_adapter_linear.py::test_folded_equals_plain_in_fp64",),
    ),
    Fault(
        "up's bias not scaled",
        f"{KERNELS}/ops/bottleneck_adapter/branch.py",
        "bias = bias * self.scale_tensor",
        "bias = bias * 1.0",
        ("tests/ops/test_bottleneck_adapter.py::test_hard_shapes",),
    ),
    Fault(
        "shape of a traced gradient wrong",
        f"{KERNELS}/ops/lora_linear/op.py",
        "dx, dbias = dy.new_empty(rows, in_features)",
        "dx, dbias = dy.new_empty(rows, out_features)",
        ("tests/ops/test_compile.py::test_opcheck_of_forward_and_backward",),
    ),
    Fault(
        "cost model folds in training as if it were inference",
        f"{KERNELS}/ops/adapter_linear/op.py",
        "(2 if trains else 1) * k * n",
        "k * n",
        ("tests/ops/test_explain.py",),
    ),
)

TRITON = (
    Fault(
        "last part of a sum split along K lost",
        f"{LOW_RANK}/shrink.py",
        "for _ in range(parts):",
        "for _ in range(parts - 1):",
        ("tests/ops/test_lora_linear.py::test_hard_shapes", "-k", "split-float32"),
    ),
    Fault(
        "last part of a sum split along M lost",
        f"{LOW_RANK}/sum_parts.py",
        "mask=(p + offs_p < P)[:, None]",
        "mask=(p + offs_p < P - 1)[:, None]",
        ("tests/ops/test_lora_linear.py::test_hard_shapes", "-k", "split-float32"),
    ),
    Fault(
        "ragged last tile along K skipped",
        f"{LOW_RANK}/expand.py",
        "for k in range(0, K, BLOCK_K):",
        "for k in range(0, K - BLOCK_K + 1, BLOCK_K):",
        ("tests/ops/test_lora_linear.py::test_hard_shapes", "-k", "split-float32"),
    ),
    Fault(
        "ragged last tile along K read past the row",
        f"{LOW_RANK}/one_pass.py",
        "mask_x = mask_x & mask_k[None, :]",
        "mask_x = mask_x",
        ("tests/ops/test_lora_linear.py::test_any_layout", "-k", "one_pass-float32"),
    ),
    Fault(
        "store past the last column",
        f"{LOW_RANK}/expand.py",
        "tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])",
        "tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None])",
        ("tests/ops/test_contract.py::test_writes_every_element_and_nothing_else",),
    ),
    Fault(
        "a row of tiles never written",
        f"{LOW_RANK}/shrink_backward.py",
        "offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)",
        "offs_r = tl.arange(0, BLOCK_R).to(tl.int64)",
        ("tests/ops/test_lora_linear.py::test_hard_shapes", "-k", "split-float32"),
    ),
    Fault(
        "act' missing, Triton",
        f"{LOW_RANK}/hidden.py",
        "dz = dh * activation_slope(z, ACTIVATION)",
        "dz = dh",
        ("tests/ops/test_adapter_linear.py::test_activations", "-k", "triton-folded-float32"),
    ),
    Fault(
        "gelu's slope without its density",
        f"{CORE}/tiles.py",
        "tl.math.erf(z * INV_SQRT_2)) + z * density",
        "tl.math.erf(z * INV_SQRT_2))",
        ("tests/ops/test_adapter_linear.py::test_activations", "-k", "triton-folded-float32"),
    ),
    Fault(
        "dropped x not rescaled in the gradient of A",
        f"{LOW_RANK}/shrink_backward.py",
        "acc *= tl.cast(rescale, tl.float32)",
        "acc *= 1.0",
        (LORA_DROPOUT, "-k", "split-float32"),
    ),
    Fault(
        "device scale not read",
        f"{CORE}/tiles.py",
        "alpha *= tl.load(scale_ptr).to(tl.float32)",
        "alpha *= 1.0",
        ("tests/ops/test_lora_linear.py::test_hard_shapes", "-k", "split-float32"),
    ),
    Fault(
        "bias of the low-rank branch skipped",
        f"{LOW_RANK}/low_rank_tile.py",
        "acc += (bias_low * effective_scale(scale, scale_ptr))[None, :]",
        "acc += 0.0",
        ("tests/ops/test_adapter_linear.py::test_hard_shapes", "-k", "triton-folded-float32"),
    ),
    Fault(
        "folded dD through W without the bias's term, Triton",
        f"{KERNELS}/ops/adapter_linear/fused.py",
        "        ddown.addr_(dz.sum(0), bias.float())",
        "        pass",
        ("tests/ops/test_adapter_linear.py::test_hard_shapes", "-k", "triton-folded-float32"),
    ),
    Fault(
        "gradient of x without the residual's, row block",
        f"{KERNELS}/ops/bottleneck_adapter/fused.py",
        "dy, up.t(), down.t(), dy if residual_is_x else None",
        "dy, up.t(), down.t(), None",
        ("tests/ops/test_bottleneck_adapter.py::test_some_gradients",),
    ),
    Fault(
        "gradient of x without the residual's, where D and U learn",
        f"{BOTTLENECK}/fused.py",
        "residual, dx = dy if residual_is_x else None, None",
        "residual, dx = None, None",
        ("tests/ops/test_bottleneck_adapter.py::test_residual_is_x",),
    ),
    Fault(
        "rows dealt to the parts without the ragged last block",
        f"{LOW_RANK}/over_rows.py",
        "blocks = tl.cdiv(M, BLOCK_M)",
        "blocks = M // BLOCK_M",
        (JOINT,),
    ),
    Fault(
        "sums over dz kept of the first units alone",
        f"{BOTTLENECK}/weight_gradients.py",
        "dz_sums, mask=mask_r & (pid_k == 0)",
        "dz_sums, mask=mask_r & (pid_k == 0) & (pid_r == 0)",
        (JOINT,),
    ),
    Fault(
        "b_u's share of the scale's gradient left out of the joint sum",
        f"{BOTTLENECK}/weight_gradients.py",
        "other += bias.to(tl.float32)",
        "other += 0.0",
        (JOINT,),
    ),
    Fault(
        "a launch saved by the joint backward not counted",
        f"{CORE}/tuning.py",
        "return 8 * k * r * parts + _LAUNCH_BYTES",
        "return 8 * k * r * parts",
        ("tests/kernels/test_tuning.py", "-k", "bottleneck"),
    ),
    Fault(
        "scale's gradient without up's bias",
        f"{LOW_RANK}/steps.py",
        "dscale = dscale + (gradients.columns * bias_up).sum()",
        "dscale = dscale + 0.0",
        ("tests/ops/test_bottleneck_adapter.py::test_residual_is_x",),
    ),
)

MODEL = (
    Fault(
        "a layer's gain ignored",
        "artemis/sites.py",
        "return factor if gain is None else factor * gain",
        "return factor",
        ("tests/artemis/test_sharing.py", "-k", "gain"),
    ),
    Fault(
        "a shared seed never runs out: one mask for ever",
        "artemis/sites.py",
        "self.pending &= ~member\n",
        "pass\n",
        ("tests/artemis/test_sharing.py", "tests/artemis/test_gradients.py", "-k", "mask or seed"),
    ),
    Fault(
        "the last rows of a shared tensor, not the first",
        "artemis/bank.py",
        "tensor[tuple(slice(size) for size in shape)]",
        "tensor[tuple(slice(-size, None) for size in shape)]",
        ("tests/artemis/test_sharing.py", "-k", "leading"),
    ),
    Fault(
        "orthogonality counted at every micro-step",
        "artemis/training/trainer.py",
        "        if self.accelerator.sync_gradients:\n            self._add",
        "        if True:\n            self._add",
        ("tests/artemis/training/test_trainer.py::test_penalty_is_added_once_per_optimizer_step",),
    ),
    Fault(
        "penalty not scaled with fp16's losses",
        "artemis/training/trainer.py",
        "penalty = penalty * self.accelerator.scaler.get_scale()",
        "pass",
        ("tests/artemis/training/test_trainer.py::test_penalty_carries_the_loss_scale",),
    ),
    Fault(
        "a zero column counts as a direction",
        "artemis/orthogonality.py",
        "count = present.sum()",
        "count = torch.tensor(len(vectors))",
        ("tests/artemis/test_orthogonality.py",),
    ),
    Fault(
        "Conv1D's weight not transposed",
        "artemis/frozen.py",
        "return module.weight.t()",
        "return module.weight",
        ("tests/artemis/test_frozen.py::test_the_same_results", "-k", "gpt2"),
    ),
    Fault(
        "folding forgets the bias that reaches the bottleneck",
        "artemis/merging.py",
        "    hidden = down @ b\n",
        "    hidden = torch.zeros_like(down @ b)\n",
        ("tests/artemis/test_merging.py", "-k", "merged_model"),
    ),
    Fault(
        "an adapter written in place: dying in mid-save leaves half a file",
        "artemis/atomic.py",
        "            os.replace(path, directory / name)",
        "            (directory / name).write_bytes(path.read_bytes())",
        ("tests/artemis/test_interrupted_save.py", "-k", "dying or killed"),
    ),
)

RANKS = (
    Fault(
        "a score that takes noise for signal",
        "artemis/importance/scores.py",
        "squared - variance / moments.batches",
        "squared",
        ("tests/artemis/test_importance.py", "-k", "weights_gradients"),
    ),
    Fault(
        "the analysis leaves the base frozen differently",
        "artemis/importance/gradients.py",
        "parameter.requires_grad_(required)",
        "parameter.requires_grad_(False)",
        ("tests/artemis/test_importance.py", "-k", "left_as_it_was"),
    ),
    Fault(
        "a cut drops the strongest directions of the bank",
        "artemis/allocation/transform.py",
        "last.append(rest @ vectors[:, :cut].flip(1))",
        "last.append(rest @ vectors[:, -cut:].flip(1))",
        ("tests/artemis/test_allocation.py", "-k", "best_approximation"),
    ),
    Fault(
        "momentum of B rotated like B, not like its gradient",
        "artemis/allocation/resize.py",
        "Change(b, 1, columns[part], rows[part])",
        "Change(b, 1, columns[part], columns[part])",
        ("tests/artemis/test_allocation.py", "-k", "first_moment"),
    ),
    Fault(
        "scores within kinds that forget what a kind costs",
        "artemis/allocation/allocate.py",
        "scores[spec.path] * sum(costs) / spent if spent",
        "scores[spec.path] / spent if spent",
        ("tests/artemis/test_allocation.py", "-k", "within_kinds"),
    ),
    Fault(
        "the start from the weights takes the weakest directions",
        "artemis/initialization.py",
        "eigenvectors.flip(1).mT",
        "eigenvectors.mT",
        ("tests/artemis/test_initialization.py",),
    ),
)

EIGHT_BITS = "tests/ops/test_quantized_ops.py::test_eight_bits"

QUANTIZED = (
    Fault(
        "codes read as 128 + c and not taken back",
        f"{CORE}/native/dots.h",
        "from_bf16(w->offset[index]) - 128 * scale",
        "from_bf16(w->offset[index])",
        (FEW_ROWS,),
    ),
    Fault(
        "every block of few rows takes the first block's sums",
        f"{CORE}/native/dots.h",
        "x->sums + top * (w->k / w->group)",
        "x->sums",
        (FEW_ROWS,),
    ),
    Fault(
        "the weight's row scales not folded into dY before it is rounded",
        f"{CORE}/eight_bit.py",
        "if logits else round_rows(dy, scale)",
        "if logits else round_rows(dy, None)",
        (EIGHT_BITS,),
    ),
    Fault(
        "the weight's row scales missing from columns of dY kept apart",
        f"{CORE}/eight_bit.py",
        "dy[:, rounded.apart].float() * scale[rounded.apart]",
        "dy[:, rounded.apart].float()",
        (EIGHT_BITS,),
    ),
    Fault(
        "the upper median taken for columns that stand out",
        f"{CORE}/native/eight_bit.c",
        "if (below > (valid - 1) / 2)",
        "if (below > valid / 2)",
        ("tests/core/test_eight_bit.py",),
    ),
    Fault(
        "a row of the weight kept apart read from its neighbour",
        f"{CORE}/native/int8_product.c",
        "k / 4 * 4 * PANEL + k % 4;",
        "k / 4 * 4 * PANEL;",
        ("tests/core/test_eight_bit.py",),
    ),
    Fault(
        "int8 sums in fp32 beyond what it holds exactly",
        f"{CORE}/eight_bit.py",
        "_EXACT = 1024",
        "_EXACT = 4096",
        ("tests/core/test_eight_bit.py", "-k", "sums_are_exact"),
    ),
    Fault(
        "a part's largest values left out of the columns'",
        f"{CORE}/native/eight_bit.c",
        "for (int64_t p = 1; p < count; ++p)",
        "for (int64_t p = 2; p < count; ++p)",
        ("tests/core/test_eight_bit.py",),
    ),
    Fault(
        "columns taken for even that are not",
        f"{CORE}/native/eight_bit.c",
        "return many < k - (k - 1) / 2;",
        "return many < 1;",
        ("tests/core/test_eight_bit.py",),
    ),
    Fault(
        "the weight's 128 left in the sums of an int8 product",
        f"{CORE}/native/int8_product.c",
        "128 * sums[rows[i]]",
        "127 * sums[rows[i]]",
        ("tests/core/test_eight_bit.py",),
    ),
    Fault(
        "columns beyond the last whole panel written from its first",
        f"{CORE}/native/int8_product.c",
        "int64_t n = first + 16 * half + j;",
        "int64_t n = first + j;",
        ("tests/core/test_eight_bit.py",),
    ),
    Fault(
        "the last rank left out behind an int8 product",
        f"{CORE}/native/int8_product.c",
        "scaled[i * rank + r] = alpha",
        "scaled[i * rank + r] = (r + 1 < rank) * alpha",
        ("tests/core/test_eight_bit.py",),
    ),
    Fault(
        "an int8 product written where it is to be added",
        f"{CORE}/native/int8_product.c",
        "if (with->accumulate)",
        "if (0)",
        ("tests/core/test_eight_bit.py",),
    ),
    Fault(
        "the last column of an odd number left out of a thin product",
        f"{CORE}/native/thin_product.c",
        "4, k / 2, k % 2};",
        "4, k / 2, 0};",
        ("tests/core/test_thin_products.py",),
    ),
    Fault(
        "what lies behind an odd row multiplied too",
        f"{CORE}/native/thin_product.c",
        "enum { size = 2 };",
        "enum { size = 4 };",
        ("tests/core/test_thin_products.py",),
    ),
    Fault(
        "a thin product's last rows taken for the last of the tile",
        f"{CORE}/native/thin_product.c",
        "line[i] = values[i][j];",
        "line[i] = values[TILE_ROWS - count + i][j];",
        ("tests/core/test_thin_products.py",),
    ),
    Fault(
        "a bias in fp32 read without its stride",
        f"{CORE}/thin_products.py",
        "bias.float().contiguous()",
        "bias.float()",
        ("tests/core/test_thin_products.py",),
    ),
    Fault(
        "numbers too small to be normal taken for zero",
        f"{CORE}/native/thin_product.c",
        "_mm512_fpclass_ps_mask(value, SUBNORMAL)",
        "0",
        ("tests/core/test_thin_products.py",),
    ),
    Fault(
        "U rounded to its bias's precision",
        f"{BOTTLENECK}/branch.py",
        "wide = accumulator(z.dtype)",
        "wide = accumulator(self.bias_up.dtype)",
        ("tests/ops/test_bottleneck_adapter.py", "-k", "digits_of_fp64"),
    ),
    Fault(
        "half of a thin factor packed twice where it lies the other way round",
        f"{CORE}/native/thin_product.c",
        "int64_t at = from + 16 * i, left",
        "int64_t at = from, left",
        ("tests/core/test_thin_products.py",),
    ),
    Fault(
        "a thin product's bias taken from the panel's first columns",
        f"{CORE}/native/thin_product.c",
        "load_f32(within, to->bias + from)",
        "load_f32(within, to->bias + first)",
        ("tests/core/test_thin_products.py",),
    ),
    Fault(
        "the scales of an int8 weight left out of what is folded through it",
        f"{CORE}/base.py",
        "down.float() * self.weight.scale, self",
        "down.float(), self",
        ("tests/ops/test_quantized_ops.py",),
    ),
    Fault(
        "the scales of an int8 weight left out of a folded dD",
        f"{CORE}/base.py",
        "return out.t().mul_(self.weight.scale)",
        "return out.t()",
        ("tests/ops/test_quantized_ops.py",),
    ),
    Fault(
        "the peak of a row of logits left out of dX",
        f"{CORE}/native/int8_product.c",
        "if (with->peak) {",
        "if (0) {",
        ("tests/core/test_eight_bit.py", "-k", "peaks"),
    ),
    Fault(
        "what rounding leaves of a logit dropped",
        f"{CORE}/native/logits.c",
        "left[j] = wanted - got;",
        "left[j] = 0;",
        ("tests/core/test_eight_bit.py", "-k", "logits"),
    ),
    Fault(
        "the second largest logit told from a lane's largest alone",
        f"{CORE}/native/logits.c",
        "larger(second[j], smaller(most, first[j]))",
        "smaller(most, first[j])",
        ("tests/core/test_eight_bit.py", "-k", "logits"),
    ),
    Fault(
        "a head's gradient rounded like any other",
        "artemis/quantization/quantize.py",
        "makes_logits=makes_logits",
        "makes_logits=False",
        ("tests/artemis/test_quantization.py", "-k", "head"),
    ),
    Fault(
        "a loaded head no longer known to make logits",
        "artemis/quantization/store.py",
        "makes_logits=module is head",
        "makes_logits=False",
        ("tests/artemis/test_quantization.py", "-k", "tied_head"),
    ),
    Fault(
        "the first group's int4 offset in every group",
        f"{CORE}/native/formats.h",
        "w->offset[index]",
        "w->offset[n * groups]",
        ("tests/core/test_quantized.py", "-k", "dequantize"),
    ),
    Fault(
        "dX lost where a packed layer has no adapter",
        f"{KERNELS}/ops/quantized_linear/op.py",
        "packed.input_gradient(dy)",
        "packed.input_gradient(0 * dy)",
        ("tests/ops/test_quantized_linear.py", "-k", "follows"),
    ),
    Fault(
        "a packed layer's scales cast with the model",
        "artemis/quantized_layers.py",
        "return PARTS",
        "return PARTS[:1]",
        ("tests/artemis/test_quantization.py", "-k", "casts"),
    ),
    Fault(
        "a packed base known by its rounded numbers",
        "artemis/identity.py",
        "getattr(module, SAMPLE)",
        "sample(module.weight.dequantize())",
        ("tests/artemis/test_quantization.py", "-k", "knows_its_base"),
    ),
    Fault(
        "the calibration's data not used",
        "artemis/quantization/quantize.py",
        "importance.get(path)",
        "None",
        ("tests/artemis/test_quantization.py", "-k", "data_weighs"),
    ),
    Fault(
        "a tied tensor loaded under one of its names only",
        "artemis/quantization/store.py",
        "made.get(stored.aliases.get(name, name))",
        "made.get(name)",
        ("tests/artemis/test_quantization_store.py", "-k", "round_trip"),
    ),
    Fault(
        "an interrupted load not undone",
        "artemis/quantization/store.py",
        "undo.callback(restore)",
        "undo.callback(list)",
        ("tests/artemis/test_quantization_store.py", "-k", "interrupted"),
    ),
    Fault(
        "a quantized base not cast as asked",
        "artemis/training/loading.py",
        "load_quantized(config, folder).to(dtype)",
        "load_quantized(config, folder)",
        ("tests/artemis/cli/test_commands.py", "-k", "is_cast"),
    ),
)

LOGITS = "tests/kernels/test_logits.py"

PACKED_KERNELS = (
    Fault(
        "the high codes of a byte multiplied by the low ones' columns",
        f"{PACKED}/weight_only.py",
        "offs_m, offs_k + HALF, M",
        "offs_m, offs_k, M",
        ("tests/kernels/test_packed.py", "-k", "weight_only"),
    ),
    Fault(
        "a part of a split sum read again by the next",
        f"{PACKED}/weight_only.py",
        "min(columns, (pid_k + 1) * chunk)",
        "min(columns, (pid_k + 1) * chunk + BLOCK_B)",
        ("tests/kernels/test_packed.py", "-k", "weight_only"),
    ),
    Fault(
        "the mask of dX laid over the base's product too",
        f"{PACKED}/epilogue.py",
        "acc += tl.where(keep, low * tl.cast(rescale, tl.float32), 0.0)",
        "acc = tl.where(keep, acc + low * tl.cast(rescale, tl.float32), 0.0)",
        ("tests/kernels/test_packed.py", "-k", "dropout"),
    ),
    Fault(
        "columns apart counted twice",
        f"{PACKED}/round_rows.py",
        "kept = torch.where(stands_out, 0.0, factor[columns])",
        "kept = factor[columns]",
        ("tests/kernels/test_packed.py", "-k", "apart"),
    ),
    Fault(
        "dY rounded without the weight's row scale",
        f"{PACKED}/steps.py",
        "packed.scale if weight.transposed else None",
        "None",
        ("tests/ops/test_packed_paths.py", "-k", "in_eight_bits"),
    ),
    Fault(
        "the subnormal numbers of e4m3 read as zeros",
        f"{PACKED}/codes.py",
        "half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7))",
        "half = tl.where(bits & 0x78, ((bits & 0x80) << 8) | ((bits & 0x7F) << 7), 0)",
        ("tests/kernels/test_packed.py", "-k", "e4m3"),
    ),
    Fault(
        "what rounding leaves of a logit dropped between tiles, Triton",
        f"{PACKED}/round_logits.py",
        "left += tl.sum(steps - (q << _BITS), 0)",
        "left += 0",
        (LOGITS,),
    ),
    Fault(
        "the second largest logit told from a lane's largest alone, Triton",
        f"{PACKED}/round_logits.py",
        "tl.where(lanes == top, second, first)",
        "tl.where(lanes == top, 0.0, first)",
        (LOGITS,),
    ),
    Fault(
        "a head's gradient rounded like any other, Triton",
        f"{PACKED}/steps.py",
        "makes_logits=makes_logits",
        "makes_logits=False",
        ("tests/ops/test_packed_paths.py", "-k", "head"),
    ),
)

GROUP_VALUES = "tests/ops/test_groups.py::test_the_values_of_the_single_calls"
GROUP_MODULES = "tests/artemis/test_groups.py"

GROUPS = (
    Fault(
        "dX of the last member alone",
        f"{KERNELS}/ops/lora_linear/group_eager.py",
        ".input_gradient(dy, dx)",
        ".input_gradient(dy)",
        (GROUP_VALUES, "-k", "eager and lora"),
    ),
    Fault(
        "8-bit sums replace what dX held",
        f"{CORE}/native/eight_bit.c",
        "STORE(LOAD(to[c]) + (float)sums[c] * factor)",
        "STORE((float)sums[c] * factor)",
        (GROUP_VALUES, "-k", "eager"),
    ),
    Fault(
        "dX through the A's of the first members, not of those that gradients reach",
        f"{KERNELS}/ops/lora_linear/group_fused.py",
        "a = torch.cat([members[index].lora_a for index in reached])",
        "a = torch.cat([members[index].lora_a for index, _ in enumerate(reached)])",
        ("tests/ops/test_groups_fused.py::test_the_values_of_the_reference", "-k", "lora"),
    ),
    Fault(
        "a bottleneck's mask drawn over the rows of the whole group",
        f"{CORE}/tiles.py",
        "width = tl.where(offs_n >= start, widths[i], width)",
        "width += widths[i]",
        ("tests/kernels/test_side_by_side.py", "-k", "mask"),
    ),
    Fault(
        "dz side by side without their scales",
        f"{KERNELS}/ops/adapter_linear/group_fused.py",
        "into=(part, sigma)",
        "into=(part, Scale())",
        ("tests/ops/test_groups_fused.py::test_the_values_of_the_reference", "-k", "adapter"),
    ),
    Fault(
        "a product by a packed weight replaces what dX held",
        f"{PACKED}/steps.py",
        "_packed(x, weight, Epilogue(residual=into), chip)",
        "into.copy_(_packed(x, weight, Epilogue(), chip))",
        ("tests/ops/test_groups_fused.py::test_packed_bases", "-k", "int8"),
    ),
    Fault(
        "outputs handed over for an equal tensor, not the same",
        "artemis/groups.py",
        "left.x is x and",
        "left.x.shape == x.shape and",
        (GROUP_MODULES, "-k", "very_same_tensor"),
    ),
    Fault(
        "outputs handed over after x changed in place",
        "artemis/groups.py",
        "module.adapter.active, cast, changes",
        "module.adapter.active, cast, None",
        (GROUP_MODULES, "-k", "same_conditions"),
    ),
    Fault(
        "outputs of an adapter that has changed since are handed over",
        "artemis/groups.py",
        "if versions != site.versions():",
        "if False:",
        (GROUP_MODULES, "-k", "adapter_changed"),
    ),
    Fault(
        "a dissolved group recomputed one by one",
        "artemis/groups.py",
        "if _recomputing():",
        "if False:",
        (GROUP_MODULES, "-k", "recomputed_as_it_was"),
    ),
)

MEASURED = (
    Fault(
        "a provider that fails the accuracy rule is timed",
        "artemis/benchmark/measure.py",
        'if rows[name]["gate"]["passed"]',
        'if name != "artemis/failing"',
        ("tests/artemis/benchmark/test_measure.py", "-k", "not_timed"),
    ),
    Fault(
        "packed weights may err as if all of a weight were rounding",
        "artemis/benchmark/packed.py",
        "limit = 2 * plain + 1e-6",
        "limit = 2 * plain + 1.0",
        ("tests/artemis/benchmark/test_measure.py", "-k", "stand_for"),
    ),
)

PERSISTENT = (
    Fault(
        "a persistent program takes one tile only",
        f"{LOW_RANK}/expand_persistent.py",
        "tl.range(tl.program_id(0), tiles_m * tiles_n, programs)",
        "tl.range(tl.program_id(0), programs, programs)",
        ("tests/kernels/test_expand_persistent.py",),
    ),
    Fault(
        "descriptors over unaligned rows",
        f"{LOW_RANK}/expand_persistent.py",
        "and x.stride(0) * x.itemsize % _ALIGNMENT == 0",
        "and True",
        ("tests/kernels/test_expand_persistent.py",),
    ),
)

TUNER = f"{KERNELS}/tuner"
TUNED_TESTS = "tests/core/test_tuner.py"
TILES_TESTS = "tests/kernels/test_tiles_search.py"

TUNING = (
    Fault(
        "a win of less than 5 % is kept",
        f"{TUNER}/timing.py",
        "median * MARGIN < usual_median",
        "median < usual_median",
        (TUNED_TESTS, "-k", "beyond_doubt"),
    ),
    Fault(
        "a win within the spread is kept",
        f"{TUNER}/timing.py",
        "and slow < usual_fast",
        "and True",
        (TUNED_TESTS, "-k", "beyond_doubt"),
    ),
    Fault(
        "the shipped table overrides the user's",
        f"{CORE}/tables.py",
        '((SHIPPED_TABLES, "shipped"), (USER_TABLES, "user\'s"))',
        '((USER_TABLES, "user\'s"), (SHIPPED_TABLES, "shipped"))',
        (TUNED_TESTS, "-k", "overrides"),
    ),
    Fault(
        "an entry stands for fewer rows than its half, too",
        f"{CORE}/tables.py",
        "most // 2 < case.rows <= most",
        "case.rows <= most",
        (TUNED_TESTS, "-k", "for_its_cases_alone"),
    ),
    Fault(
        "configurations that spill are timed",
        f"{TUNER}/tiles.py",
        "and not resources.stack",
        "and True",
        (TILES_TESTS, "-k", "never_timed"),
    ),
    Fault(
        "configurations beyond the chip's shared memory are compiled",
        f"{TUNER}/tiles.py",
        "if staged_bytes(kernel, shape, config) <= chip.shared_bytes",
        "if True",
        (TILES_TESTS, "-k", "even_compiled"),
    ),
    Fault(
        "tiles of dX looked up without the mask that it draws",
        f"{TUNER}/lookups.py",
        'masked = back and r > 0 and case.drops and case.op == "lora_linear"',
        "masked = False",
        ("tests/kernels/test_tiles_search.py", "-k", "lookups"),
    ),
    Fault(
        "a group's dX searched at one member's width",
        f"{TUNER}/lookups.py",
        "0 if place else r, back=True",
        "0 if place else case.width, back=True",
        ("tests/kernels/test_tiles_search.py", "-k", "groups"),
    ),
    Fault(
        "a folded bottleneck takes LoRA's entries",
        f"{KERNELS}/ops/frozen_linear/op.py",
        'return "lora" if linear else "folded"',
        'return "lora"',
        (TUNED_TESTS, "-k", "its_own_entries"),
    ),
    Fault(
        "few rows in one call, whatever the table says of them",
        f"{KERNELS}/ops/frozen_linear/op.py",
        "self._most_rows = in_one.index(False)",
        "self._most_rows = most",
        (TUNED_TESTS, "-k", "few_rows_in_one_call"),
    ),
    Fault(
        "every tile shown as the default",
        f"{CORE}/tables.py",
        'key: (Config(**entry["chosen"]), whose)',
        'key: (Config(**entry["chosen"]), "default")',
        (TUNED_TESTS, "-k", "shown_tiles"),
    ),
)

FROZEN = "tests/ops/test_frozen_linear.py"
KEPT = "tests/artemis/test_frozen.py"
INFERENCE = (
    Fault(
        "constants of inference kept through compiled training",
        "artemis/layers.py",
        "        if mode:\n            self.adapter.forget()\n",
        "",
        ("tests/artemis/training/test_compile.py::test_it_evaluates_as_without",),
    ),
    Fault(
        "the bias of the up-projection not taken back where the adapter reads the output",
        f"{CORE}/frozen.py",
        "before = -shift",
        "before = None",
        (f"{FROZEN}::test_each_bias_may_be_absent",),
    ),
    Fault(
        "the base's bias not folded into the units'",
        f"{CORE}/frozen.py",
        "before, through, inner = bias, down, bias_down",
        "before, through, inner = None, down, bias_down",
        (f"{FROZEN}::test_each_bias_may_be_absent",),
    ),
    Fault(
        "the units read x where they read the output",
        f"{CORE}/native/frozen.c",
        "hidden(&output, m, n, &a, h);",
        "hidden(&input, m, k, &a, h);",
        (f"{FROZEN}::test_few_rows_in_one_pass",),
    ),
    Fault(
        "the units' bias left out, C",
        f"{CORE}/native/frozen.c",
        "float z = out[i - top][u - first] + shift;",
        "float z = out[i - top][u - first] + 0 * shift;",
        (f"{FROZEN}::test_few_rows_in_one_pass",),
    ),
    Fault(
        "weights read as 128 too large and not taken back",
        f"{CORE}/native/dots.h",
        " -= 128 * x->fixed->sum",
        " -= 0",
        (f"{FROZEN}::test_lora",),
    ),
    Fault(
        "a row taken in fixed point whatever stands out of it",
        f"{CORE}/native/fixed_point.h",
        "32512 * count > 64 * (int64_t)_mm512_reduce_add_epi32(sizes)",
        "0",
        (f"{FROZEN}::test_features_that_stand_out",),
    ),
    Fault(
        "the last numbers of a row of x not put into fixed point",
        f"{CORE}/native/fixed_point.h",
        "left >= 16 ? 0xffff : (1u << left) - 1",
        "left >= 16 ? 0xffff : 0",
        (f"{FROZEN}::test_a_row_of_any_width",),
    ),
    Fault(
        "the last columns of a row of bf16 left out",
        f"{CORE}/native/dots.h",
        "for (; c < k; c += 32) {\n            __mmask32",
        "for (; c + 32 <= k; c += 32) {\n            __mmask32",
        (f"{FROZEN}::test_a_row_of_any_width",),
    ),
    Fault(
        "constants kept when a tensor changes in place",
        "artemis/frozen.py",
        "if tensor._version != version or tensor.data_ptr() != address:",
        "if tensor.data_ptr() != address:",
        (f"{KEPT}::test_no_change_goes_unseen",),
    ),
    Fault(
        "constants kept when a tensor's storage changes",
        "artemis/frozen.py",
        "if tensor._version != version or tensor.data_ptr() != address:",
        "if tensor._version != version:",
        (f"{KEPT}::test_no_change_goes_unseen",),
    ),
    Fault(
        "constants kept when a parameter is replaced",
        "artemis/frozen.py",
        "if holder.get(name) is not tensor:",
        "if False:",
        (f"{KEPT}::test_no_change_goes_unseen",),
    ),
    Fault(
        "constants copied with the model",
        "artemis/sites.py",
        'return self.__dict__ | {"frozen": None}',
        "return dict(self.__dict__)",
        (f"{KEPT}::test_copies_start_without",),
    ),
    Fault(
        "an adapter with a bias taken for a fresh one",
        "artemis/frozen.py",
        'for role in ("lora_b", "up", "bias_up") if',
        'for role in ("lora_b", "up") if',
        (f"{KEPT}::test_one_term_is_enough_to_count",),
    ),
)

FAULTS = (
    *MASK,
    *LOSS,
    *EAGER,
    *TRITON,
    *PERSISTENT,
    *MEASURED,
    *MODEL,
    *RANKS,
    *QUANTIZED,
    *PACKED_KERNELS,
    *GROUPS,
    *TUNING,
    *INFERENCE,
)
