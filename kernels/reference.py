"""Every op in plain PyTorch: the definition, the fallback on a CPU, the oracle of tests, the baseline of benchmarks.

Shapes: B batch, T query length, S key length, H query heads, H_kv key-value heads (H a multiple of H_kv), D head size,
C width, V vocabulary. Nothing here imports Triton, and no argument is ever written to.
"""

import itertools

import torch
import torch.nn.functional as F

CHUNK_LOGITS, CHUNK_ROWS = 1 << 21, 256
"""linear_cross_entropy makes so many logits at a time (8 MB of float32), but those of no fewer rows than this."""
MAX_SCALE = 1e37
"""Of attention's scores, far from the end of float32."""
MAX_NORM_WIDTH = 65536
NORM_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def attention(q, k, v, *, causal, window=None, document_ids=None, dropout_p=0.0, seed=None, scale=None,
              deterministic=True):
    """softmax(scale · q kᵀ + mask) v, head by head (arXiv 1706.03762; grouped queries arXiv 2305.13245).

    q (B, T, H, D); k, v (B, S, H_kv, D), all of one floating dtype; gives (B, T, H, D). `causal`: key j is visible to
    query i iff j <= i + S - T (bottom right). `window` w also asks i + S - T - j < w. `document_ids` (B, T) integers
    of 32 bits, S = T, hides keys of other documents. `scale`: 1/sqrt(D) unless given. `dropout_p` drops attention
    weights; with `seed` the mask is a function of it, without it torch's generator draws. A query without a visible
    key gives zeros. Every path here is deterministic, so `deterministic` changes nothing.
    """
    check_attention(q, k, v, window=window, document_ids=document_ids, dropout_p=dropout_p, seed=seed,
                    scale=scale)
    T, S = q.shape[1], k.shape[1]
    window = None if window is None or window >= S else window                      # one of S hides nothing
    seeded = dropout_p > 0 and seed is not None
    if scale is not None and scale <= 0:                # torch's own causal mask is -inf times the scale
        q, scale = q * (-1 if scale else 0), -scale or 1.0
    flag_says_all = window is None and document_ids is None and (not causal or T == S or T == 1 <= S)
    mask = None if flag_says_all and not seeded else _visible(T, S, causal, window, document_ids, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                # (B, H, T, D)
    if seeded:
        return _attention_seeded_dropout(q, k, v, mask, dropout_p, seed, scale).transpose(1, 2)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None and T > 1, dropout_p=dropout_p, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)                                                        # (B, T, H, D)


def check_attention(q, k, v, *, window=None, document_ids=None, dropout_p=0.0, seed=None, scale=None):
    """Raise ValueError where the arguments of `attention` do not fit together."""
    check_kinds("attention", torch.Tensor, "a tensor", q=q, k=k, v=v)
    check_kinds("attention", (torch.Tensor, type(None)), "a tensor or None", document_ids=document_ids)
    check_kinds("attention", (int, torch.SymInt, type(None)), "a whole number or None", window=window, seed=seed)
    check_kinds("attention", (float, int, torch.SymFloat, type(None)), "a number or None", scale=scale)
    check_kinds("attention", (float, int, torch.SymFloat), "a number", dropout_p=dropout_p)
    if (q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3] or not k.shape[2]
            or q.shape[2] % k.shape[2]):
        raise ValueError(f"attention takes q (B, T, H, D) and k, v (B, S, H_kv, D) with H a multiple of H_kv, "
                         f"not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point() or x.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise ValueError(f"attention: {name} is {x.dtype}, q {q.dtype}; all must be of one floating dtype")
    for name, x in (("k", k), ("v", v), ("document_ids", document_ids)):
        if x is not None and x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device}, q on {q.device}; they must be on one device")
    if window is not None and window < 1:
        raise ValueError(f"attention window = {window}; the least is 1")
    if document_ids is not None:
        if not q.shape[:2] == document_ids.shape == k.shape[:2]:
            raise ValueError(f"document_ids {tuple(document_ids.shape)} must be (B, T) with S = T, here "
                             f"T = {q.shape[1]} and S = {k.shape[1]}")
        if document_ids.is_floating_point() or document_ids.dtype == torch.bool:
            raise ValueError(f"attention: document_ids are {document_ids.dtype}; they must be integers")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p = {dropout_p} is not in [0, 1)")
    if seed is not None and not -2**63 <= seed < 2**63:
        raise ValueError(f"attention: seed = {seed} does not fit 64 bits")
    if scale is not None and not abs(scale) < MAX_SCALE:
        raise ValueError(f"attention: scale = {scale} is not a number below {MAX_SCALE:.0e}")


def check_kinds(op, kinds, words, **given):
    """Raise ValueError that names the argument that is of another type."""
    for name, value in given.items():
        if not isinstance(value, kinds):
            raise ValueError(f"{op}: {name} = {value!r} is {type(value).__name__}, not {words}")


def _visible(T, S, causal, window, document_ids, device):
    """Boolean, true where a key is visible: (T, S), with documents (B, 1, T, S)."""
    distance = (torch.arange(T, device=device) + (S - T))[:, None] - torch.arange(S, device=device)
    visible = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < window
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return visible


def _attention_seeded_dropout(q, k, v, mask, dropout_p, seed, scale):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1))
    generator = torch.Generator(q.device).manual_seed(seed)
    kept = torch.rand(weights.shape, generator=generator, device=q.device) >= dropout_p
    return (weights * kept / (1 - dropout_p)).to(v.dtype) @ v


def decode_attention(q, k_cache, v_cache, lengths, *, window=None, scale=None):
    """Attention of one new token a row over the keys in its cache: softmax(scale · q kᵀ) v, head by head.

    q (B, H, D), the new tokens' queries; k_cache, v_cache (B, S, H_kv, D), of the same floating dtype, H a multiple of
    H_kv; gives (B, H, D). Row b sees keys 0 to lengths[b] - 1, with a `window` w the last w of these; lengths (B,)
    integers from 0, which gives zeros, to S. What lies in the cache elsewhere is not read. `scale`: 1/sqrt(D) unless
    given. No row depends on another. ValueError where the arguments do not fit.
    """
    check_decode_attention(q, k_cache, v_cache, lengths, window, scale)
    S, parts, first = k_cache.shape[1], [], 0
    for length, run in itertools.groupby(min(max(0, length), S) for length in lengths.tolist()):
        rows = slice(first, first + len(list(run)))     # neighbours of one length, in one call
        seen, first = slice(max(0, length - (window or length)), length), rows.stop
        k, v = k_cache[rows, seen].transpose(1, 2), v_cache[rows, seen].transpose(1, 2)     # (rows, H_kv, keys, D)
        parts.append(F.scaled_dot_product_attention(q[rows].unsqueeze(2), k, v, scale=scale,
                                                    enable_gqa=q.shape[1] != k.shape[1]).squeeze(2) if length
                     else torch.zeros_like(q[rows]))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def check_decode_attention(q, k_cache, v_cache, lengths, window, scale):
    """Raise ValueError where the arguments of `decode_attention` do not fit together."""
    op = "decode_attention"
    check_pointwise(op, "q", q, k_cache=k_cache, v_cache=v_cache)
    check_kinds(op, torch.Tensor, "a tensor", lengths=lengths)
    check_kinds(op, (int, torch.SymInt, type(None)), "a whole number or None", window=window)
    check_kinds(op, (float, int, torch.SymFloat, type(None)), "a number or None", scale=scale)
    if (q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or len(q) != len(k_cache)
            or q.shape[2] != k_cache.shape[3] or not k_cache.shape[2] or q.shape[1] % k_cache.shape[2]):
        raise ValueError(f"{op} takes q (B, H, D) and caches (B, S, H_kv, D) with H a multiple of H_kv, not "
                         f"{tuple(q.shape)}, {tuple(k_cache.shape)}, {tuple(v_cache.shape)}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} is {x.dtype}, q {q.dtype}; all must be of one floating dtype")
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64) or lengths.device != q.device:
        raise ValueError(f"{op}: lengths {tuple(lengths.shape)} {lengths.dtype} on {lengths.device} must be "
                         f"({len(q)},) integers on {q.device}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window = {window}; the least is 1")
    if scale is not None and not 0 < scale < MAX_SCALE:
        raise ValueError(f"{op}: scale = {scale} is not between 0 and {MAX_SCALE:.0e}")


def layer_norm(x, weight, bias, eps, residual=None):
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dimension (arXiv 1607.06450); computed in float32.

    x (..., C), C up to 65536; weight, bias (C,) or None, in the dtype of x or another. With `residual` (..., C): gives
    (norm of x + residual, x + residual), the norm in the dtype of x, the sum in the wider of the two's. ValueError
    where the arguments do not fit.
    """
    check_norm("layer_norm", x, eps, residual, weight=weight, bias=bias)
    total = x if residual is None else x + residual
    y = F.layer_norm(_wide(total), x.shape[-1:], _wide(weight), _wide(bias), eps).to(x.dtype)
    return y if residual is None else (y, total)


def rms_norm(x, weight, eps, residual=None):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467); computed in float32.

    x (..., C), C up to 65536; weight (C,) or None, in the dtype of x or another. With `residual` (..., C): gives
    (norm of x + residual, x + residual), the norm in the dtype of x, the sum in the wider of the two's. ValueError
    where the arguments do not fit.
    """
    check_norm("rms_norm", x, eps, residual, weight=weight)
    total = x if residual is None else x + residual
    y = F.rms_norm(_wide(total), x.shape[-1:], _wide(weight), eps).to(x.dtype)
    return y if residual is None else (y, total)


def check_norm(op, x, eps, residual=None, dtypes=NORM_DTYPES, **parameters):
    """Raise ValueError where the arguments of `layer_norm` or `rms_norm` do not fit together."""
    check_kinds(op, torch.Tensor, "a tensor", x=x)
    check_kinds(op, (torch.Tensor, type(None)), "a tensor or None", residual=residual, **parameters)
    check_kinds(op, (float, int, torch.SymFloat), "a number", eps=eps)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_NORM_WIDTH:
        raise ValueError(f"{op}: x {tuple(x.shape)} must be (..., C) with C from 1 to {MAX_NORM_WIDTH}")
    dtype, device, row = x.dtype, x.device, x.shape[-1:]
    if dtype not in dtypes:
        raise ValueError(f"{op}: x is {dtype}; it must be one of {', '.join(map(str, dtypes))}")
    for name, tensor, shape in (("residual", residual, x.shape), *((*given, row) for given in parameters.items())):
        if tensor is None or tensor.shape == shape and tensor.dtype == dtype and tensor.device == device:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} {tuple(tensor.shape)} must be {tuple(shape)}, as x is {tuple(x.shape)}")
        if tensor.dtype not in dtypes or (tensor.dtype == torch.float64) != (dtype == torch.float64):
            raise ValueError(f"{op}: {name} is {tensor.dtype}, x {dtype}; each must be one of "
                             f"{', '.join(map(str, dtypes))}, and float64 goes with float64 only")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {device}; they must be on one device")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps = {eps} is not a finite number of 0 or more")


def _wide(x):
    """At least float32: torch's CPU kernels sum a bfloat16 weight's gradient in bfloat16, 7 % off over 8192 rows."""
    return x if x is None or x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def rotary(q, k, cos, sin, positions=None):
    """Turn the pairs (x_i, x_{i + D/2}) of every head by its position's angles (arXiv 2104.09864).

    q (B, T, H, D), k (B, T, H_kv, D), floating, D even; cos, sin (N, D/2) for positions 0 to N - 1; positions (T,) or
    (B, T) integers, 0 to T - 1 unless given. Gives new (q, k); cos and sin get no gradient. ValueError where the
    arguments do not fit.
    """
    check_rotary(q, k, cos, sin, positions)
    return _rotate(q, cos, sin, positions), _rotate(k, cos, sin, positions)


def check_rotary(q, k, cos, sin, positions, op="rotary"):
    """Raise ValueError where the arguments of `rotary` do not fit together."""
    check_kinds(op, (torch.Tensor, type(None)), "a tensor or None", positions=positions)
    check_pointwise(op, "q", q, k=k, cos=cos, sin=sin)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        raise ValueError(f"{op} takes q (B, T, H, D) and k (B, T, H_kv, D) with D even, not {tuple(q.shape)}, "
                         f"{tuple(k.shape)}")
    if q.dtype != k.dtype:
        raise ValueError(f"{op}: k is {k.dtype}, q {q.dtype}; they must be alike")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] != q.shape[3] // 2:
        raise ValueError(f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (N, D/2), here "
                         f"D = {q.shape[3]}")
    if positions is None:
        if len(cos) < q.shape[1]:
            raise ValueError(f"{op}: {q.shape[1]} tokens, and cos and sin for {len(cos)} positions")
    elif positions.shape not in (q.shape[1:2], q.shape[:2]) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: positions {tuple(positions.shape)} {positions.dtype} must be (T,) or (B, T) "
                         f"integers, here B = {q.shape[0]} and T = {q.shape[1]}")
    elif positions.device != q.device:
        raise ValueError(f"{op}: positions are on {positions.device}, q on {q.device}; they must be on one device")


def _rotate(x, cos, sin, positions):
    if positions is None:
        cos, sin = cos[:x.shape[1]], sin[:x.shape[1]]
    else:
        cos, sin = cos[positions], sin[positions]                                   # (T, D/2) or (B, T, D/2)
    cos, sin = (part.detach().unsqueeze(-2).to(x.dtype) for part in (cos, sin))     # (..., T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * torch.cat((cos, cos), dim=-1), torch.cat((b, a), dim=-1), torch.cat((-sin, sin), dim=-1))


def split_heads(x, heads, q_weight=None, k_weight=None, eps=1e-5, cos=None, sin=None, positions=None):
    """What stands between a fused projection and attention: queries, keys and values, normalised and turned.

    x (B, T, H + 2 H_kv, D) floating, heads = (H, H_kv, H_kv). q and k are `rms_norm` of their heads with q_weight and
    k_weight (D,), where given, then `rotary` of that with cos, sin and positions, where given; v is a view of x, and so
    are q and k where neither is given. Gives q (B, T, H, D), k and v (B, T, H_kv, D). ValueError where the arguments do
    not fit.
    """
    check_split_heads(x, heads, q_weight, k_weight, eps, cos, sin, positions)
    qk, v = x.split((heads[0] + heads[1], heads[2]), dim=2)
    if q_weight is not None:
        weight = torch.cat((_wide(q_weight).expand(heads[0], -1), _wide(k_weight).expand(heads[1], -1)))
        qk = (F.rms_norm(_wide(qk), qk.shape[-1:], eps=eps) * weight).to(x.dtype)
    if cos is not None:
        qk = _rotate(qk, cos, sin, positions)
    return *qk.split(heads[:2], dim=2), v


def check_split_heads(x, heads, q_weight, k_weight, eps, cos, sin, positions):
    """Raise ValueError where the arguments of `split_heads` do not fit together."""
    op = "split_heads"
    check_pointwise(op, "x", x)
    if x.dim() != 4 or len(heads) != 3 or min(heads) < 1 or heads[1] != heads[2] or sum(heads) != x.shape[2]:
        raise ValueError(f"{op} takes x (B, T, H + 2 H_kv, D) and heads (H, H_kv, H_kv), not {tuple(x.shape)} and "
                         f"{heads}")
    for pair, (first, second) in (("q_weight and k_weight", (q_weight, k_weight)), ("cos and sin", (cos, sin))):
        if (first is None) != (second is None):
            raise ValueError(f"{op}: {pair} go together; give both or neither")
    q, k, _ = x.split(heads, dim=2)
    if q_weight is not None:
        check_norm(op, q, eps, q_weight=q_weight, k_weight=k_weight)
    if cos is not None:
        check_rotary(q, k, cos, sin, positions, op)


def swiglu(gate, up=None):
    """silu(gate) · up (arXiv 2002.05202), of one shape and floating dtype; without `up`, gate (..., 2N) holds both.

    ValueError where the arguments do not fit.
    """
    check_swiglu(gate, up)
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def check_swiglu(gate, up):
    """Raise ValueError where the arguments of `swiglu` do not fit together."""
    check_pointwise("swiglu", "gate", gate, **({} if up is None else dict(up=up)))
    if up is None and (not gate.dim() or gate.shape[-1] % 2):
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} must be (..., 2N), two halves, where there is no up")
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype):
        raise ValueError(f"swiglu: up is {tuple(up.shape)} {up.dtype}, gate {tuple(gate.shape)} {gate.dtype}; they "
                         "must be alike")


def gelu(x, bias=None, approximate="tanh"):
    """GELU of x + bias (arXiv 1606.08415), by erf ("none") or its tanh approximation, in the dtype of x.

    x (..., C) floating; bias (C,), in another dtype if need be, added in the wider of the two. ValueError where the
    arguments do not fit.
    """
    check_gelu(x, bias, approximate)
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)


def check_gelu(x, bias, approximate):
    """Raise ValueError where the arguments of `gelu` do not fit together."""
    check_pointwise("gelu", "x", x, **({} if bias is None else dict(bias=bias)))
    if bias is not None and (not x.dim() or bias.shape != x.shape[-1:]):
        raise ValueError(f"gelu: bias {tuple(bias.shape)} must be (C,), as x is {tuple(x.shape)}")
    if approximate not in ("tanh", "none"):
        raise ValueError(f"gelu: approximate {approximate!r} is none of: tanh, none")


def squared_relu(x):
    """max(x, 0)² (arXiv 2109.08668); x floating."""
    check_pointwise("squared_relu", "x", x)
    return _SquaredRelu.apply(x)


def check_pointwise(op, name, x, **others):
    """Raise ValueError unless all are floating tensors on one device."""
    check_kinds(op, torch.Tensor, "a tensor", **{name: x}, **others)
    for other, tensor in {name: x, **others}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {other} is {tensor.dtype}; it must be floating")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {other} is on {tensor.device}, {name} on {x.device}; they must be on one device")


class _SquaredRelu(torch.autograd.Function):
    """With a gradient of two passes over memory, 2 x · grad where x > 0, instead of autograd's three."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu(x).square()

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors                          # itself, through which a second derivative goes
        return torch.ops.aten.threshold_backward(torch.addcmul(x.new_zeros(()), grad, x, value=2), x, 0)


def quantized_linear(x, packed_weight, scales, bias=None):
    """x Wᵀ + bias, W in whole numbers of 8 or 4 bits times a scale for each group of a row: W = q · scale.

    x (..., K) floating. packed_weight: int8 (N, K), or uint8 (N, K/2) with two numbers of 4 bits in a byte, each stored
    plus 8: byte i of a group has its i-th number in the low half and, in the high one, the i-th of its second half.
    scales (N, G), floating, K a multiple of G: those of the groups of K/G numbers in turn.
    bias (N,) or None. Gives (..., N) in the dtype of x; the gradient is that of x alone. `quantize` makes the packed
    weight and the scales. ValueError where the arguments do not fit.
    """
    check_quantized_linear(x, packed_weight, scales, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, dequantize(packed_weight, scales.detach(), x.dtype),
                        None if bias is None else bias.detach().to(x.dtype))


def quantize(weight, bits, group_size=None):
    """(packed weight, scales) of a floating weight (N, K) for `quantized_linear`; 8 or 4 bits, by row unless grouped.

    scale = max |w| / 127 or / 7 of a group, q = round(w / scale): symmetric, nearest. Scales are float32. ValueError
    for other bits, a group size that does not divide K, an odd K at 4 bits, or numbers that are not finite.
    """
    if bits not in (8, 4):
        raise ValueError(f"quantize: bits = {bits} is none of: 8, 4")
    N, K = weight.shape
    group_size = K if group_size is None else group_size
    if group_size < 1 or K % group_size or bits == 4 and group_size % 2:
        raise ValueError(f"quantize: group_size = {group_size} must divide K = {K}{', and be even' * (bits == 4)}")
    groups = weight.detach().float().view(N, K // group_size, group_size)
    if not groups.isfinite().all():
        raise ValueError("quantize: the weight holds numbers that are not finite")
    most = 2 ** (bits - 1) - 1
    scales = groups.abs().amax(-1) / most                                           # (N, G)
    whole = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-most, most)
    if bits == 8:
        return whole.to(torch.int8).view(N, K), scales
    low, high = (whole + 8).to(torch.uint8).chunk(2, -1)                            # (N, G, group_size / 2)
    return (low | high << 4).view(N, K // 2), scales


def dequantize(packed_weight, scales, dtype=None):
    """The (N, K) weight, rounded once, in the dtype of the scales unless one is given."""
    dtype = dtype or scales.dtype
    scales = scales.to(torch.promote_types(dtype, torch.float32))
    return (unpacked(packed_weight, scales.shape[1]) * scales[..., None]).flatten(1).to(dtype)


def unpacked(packed_weight, num_groups):
    """The whole numbers of a packed weight, int8 (N, G, K/G)."""
    groups = packed_weight.unflatten(1, (num_groups, -1))
    if packed_weight.dtype == torch.uint8:
        groups = torch.cat((groups & 15, groups >> 4), dim=-1).to(torch.int8) - 8
    return groups


def check_quantized_linear(x, packed_weight, scales, bias):
    """Raise ValueError where the arguments of `quantized_linear` do not fit together."""
    op = "quantized_linear"
    check_pointwise(op, "x", x, scales=scales, **({} if bias is None else dict(bias=bias)))
    check_kinds(op, torch.Tensor, "a tensor", packed_weight=packed_weight)
    if packed_weight.dtype not in (torch.int8, torch.uint8) or packed_weight.device != x.device:
        raise ValueError(f"{op}: packed_weight is {packed_weight.dtype} on {packed_weight.device}; it must be "
                         f"torch.int8, or torch.uint8 for 4 bits, on {x.device}")
    if packed_weight.dim() != 2 or scales.dim() != 2 or not x.dim():
        raise ValueError(f"{op} takes x (..., K), packed_weight (N, K or K/2), scales (N, G), not {tuple(x.shape)}, "
                         f"{tuple(packed_weight.shape)}, {tuple(scales.shape)}")
    in_a_byte = 2 if packed_weight.dtype == torch.uint8 else 1
    N, K, G = packed_weight.shape[0], packed_weight.shape[1] * in_a_byte, scales.shape[1]
    if x.shape[-1] != K or len(scales) != N or not G or K % (G * in_a_byte) or (
            bias is not None and bias.shape != (N,)):
        raise ValueError(f"{op}: a weight of N = {N}, K = {K} does not go with x {tuple(x.shape)}, scales "
                         f"{tuple(scales.shape)}" + (f" and bias {tuple(bias.shape)}" if bias is not None else ""))


def linear_cross_entropy(hidden, weight, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None,
                         reduction="mean"):
    """Cross-entropy of the logits z = hidden · weightᵀ, in float32, some rows at a time: they never exist in full.

    hidden (..., C) and weight (V, C) floating, targets (...) int64 from 0 to V - 1 or `ignore_index`, which leaves a
    target out. With lse = logsumexp(z) and e = label_smoothing (arXiv 1512.00567), the loss of a target y is
    lse - (1 - e) z_y - e mean(z) + z_loss · lse² (arXiv 2204.02311). `softcap` c turns z into c · tanh(z / c) before.
    `reduction`: "sum", "mean" over the targets that count (0 where none does) or "none", the loss of each target, 0
    where ignored. Gives float32, and float64 for float64. Gradients are those of weight's and hidden's dtypes, the
    weight's summed in float32. ValueError where the arguments do not fit together.
    """
    check_linear_cross_entropy(hidden, weight, targets, ignore_index, label_smoothing, z_loss, softcap, reduction)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()   # or gradients were made that nobody asks for
    losses = _LossEach if reduction == "none" else _LossSum
    with torch.autocast(device, enabled=False):
        loss = losses.apply(hidden.flatten(0, -2), weight, targets.flatten(),
                            (ignore_index, label_smoothing, z_loss, softcap))
    return reduced(loss, targets, ignore_index, reduction)


def reduced(loss, targets, ignore_index, reduction):
    """From the loss of each target for "none", else from their sum."""
    if reduction == "none":
        return loss.view(targets.shape)
    return loss if reduction == "sum" else loss / (targets != ignore_index).sum().clamp(min=1)


def check_linear_cross_entropy(hidden, weight, targets, ignore_index, label_smoothing, z_loss, softcap, reduction):
    """Raise ValueError where the arguments of `linear_cross_entropy` do not fit together."""
    op = "linear_cross_entropy"
    check_kinds(op, torch.Tensor, "a tensor", hidden=hidden, weight=weight, targets=targets)
    check_kinds(op, (int, torch.SymInt), "a whole number", ignore_index=ignore_index)
    check_kinds(op, (float, int, torch.SymFloat), "a number", label_smoothing=label_smoothing, z_loss=z_loss)
    check_kinds(op, (float, int, torch.SymFloat, type(None)), "a number or None", softcap=softcap)
    if (hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape
            or hidden.shape[:-1] != targets.shape):
        raise ValueError(f"{op} takes hidden (..., C), weight (V, C) and targets (...), not {tuple(hidden.shape)}, "
                         f"{tuple(weight.shape)}, {tuple(targets.shape)}")
    for name, x in (("hidden", hidden), ("weight", weight)):
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} is {x.dtype}; it must be floating")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets are {targets.dtype}; they must be torch.int64")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {x.device}, hidden on {hidden.device}; they must be on one device")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing = {label_smoothing} is not in [0, 1]")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss = {z_loss} is not a finite number of 0 or more")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap = {softcap} is not a finite number above 0")
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"{op}: reduction {reduction!r} is none of: sum, mean, none")


class _LossSum(torch.autograd.Function):
    """The sum of all losses, with both gradients made on the way."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, settings):
        losses, *grads = _losses_and_gradients(hidden, weight, targets, settings, 1.0, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *(x if x is None else scaled(grad, x) for x in ctx.saved_tensors), None, None


def scaled(factor, x):
    """x times a scalar, which is not rounded to the dtype of x before."""
    return (x.to(torch.promote_types(x.dtype, factor.dtype)) * factor).to(x.dtype)


class _LossEach(torch.autograd.Function):
    """The loss of each target; the backward makes the logits again, as only it knows what each loss counts."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, settings):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = settings
        return _losses_and_gradients(hidden, weight, targets, settings, 1.0, (False, False))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        _, *grads = _losses_and_gradients(*ctx.saved_tensors, ctx.settings, grad[:, None], ctx.needs_input_grad[:2])
        return *grads, None, None


def _losses_and_gradients(hidden, weight, targets, settings, scales, wanted):
    """The loss of each target (N,), and of their sum weighted by `scales` the gradients (N, C), (V, C) or None.

    A chunk's logits become, in place, their softmax and then their gradient, and are dropped before the next chunk's
    are made: memory does not grow with N, and they stay in the cache.

        d loss / d z = softmax(z) (1 + 2 z_loss lse) - (1 - e) [at y] - e / V,  times 1 - (z / c)² under a softcap c
    """
    ignore_index, label_smoothing, z_loss, softcap = settings
    V, matrix = len(weight), weight.to(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    hidden_grad = torch.empty_like(hidden) if wanted[0] else None
    weight_grad = torch.zeros_like(weight, dtype=losses.dtype) if wanted[1] else None
    scales = torch.as_tensor(scales, device=hidden.device).expand(len(hidden), 1)
    size = max(CHUNK_ROWS, CHUNK_LOGITS // V)
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        rows, target = hidden[chunk], targets[chunk, None]                          # (n, C), (n, 1)
        counts = target != ignore_index
        target = target.where(counts, 0)
        z = (rows @ matrix.T).to(losses.dtype)                                      # (n, V)
        if softcap is not None:
            z.div_(softcap).tanh_()
            slope = 1 - z.square()
            z.mul_(softcap)
        top, picked = z.amax(-1, keepdim=True), z.gather(1, target)                 # (n, 1)
        mean = z.mean(-1, keepdim=True) if label_smoothing else 0.0
        sums = z.sub_(top).exp_().sum(-1, keepdim=True)
        lse = sums.log() + top
        loss = lse - (1 - label_smoothing) * picked - label_smoothing * mean + z_loss * lse.square()
        losses[chunk] = loss.where(counts, 0.0)[:, 0]
        if not any(wanted):
            continue
        scale = counts * scales[chunk]
        z.mul_(scale * (1 + 2 * z_loss * lse) / sums)
        z.scatter_add_(1, target, scale * (label_smoothing - 1.0))
        if label_smoothing:
            z.sub_(scale * (label_smoothing / V))
        if softcap is not None:
            z.mul_(slope)
        z = z.to(hidden.dtype)
        if hidden_grad is not None:
            torch.mm(z, matrix, out=hidden_grad[chunk])
        if weight_grad is not None:
            weight_grad += z.T @ rows
    return losses, hidden_grad, weight_grad if weight_grad is None else weight_grad.to(weight.dtype)
