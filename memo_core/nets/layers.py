"""Building blocks both networks share: attention, feed-forward, residual and resampling blocks, the time embedding.

Parameter names are those of the released checkpoint. `ops` supplies the layer classes (Linear, Conv2d, GroupNorm,
LayerNorm, Embedding), `torch.nn` unless a host brings its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import devices, kernels

# Between layers the Diffusion Net's hidden states may be carried in a finer format than the layers compute in
# (`precision`): a layer reads them rounded, and what it adds is rounded once. Layers' formats are those of their norms.


def narrowed(x: Tensor, norm: Any) -> Tensor:
    """x in the norm's number format, where x has a finer one."""
    return x.to(norm.weight.dtype) if norm.weight.dtype.itemsize < x.dtype.itemsize else x


def widened(y: Tensor, carried: torch.dtype, norm: Any) -> Tensor:
    """y in the carried format, where that is finer than the norm's and no kernel reads y as it is."""
    finer = norm.weight.dtype.itemsize < carried.itemsize
    return y.to(carried) if finer and not norm_is_kernel(y, norm) else y


# Where the kernels run (`kernels.fuses`), what lies between two products is one pass over memory: a norm reads the
# finer format itself, a residual sum and the norm after it are one, and maps lie channels-last, so that nothing is
# transposed. Elsewhere the same in torch's operators, as stated here.


def as_laid_out(x: Tensor) -> Tensor:
    """Maps as they lie in memory from the first convolution on."""
    return x.contiguous(memory_format=torch.channels_last) if kernels.fuses(x) else x


def norm_is_kernel(x: Tensor, norm: Any) -> bool:
    """Whether a norm of x is one of the kernels: its weights are at hand, as they are not with a host that brings or
    patches them at use.
    """
    weight = getattr(norm, "weight", None)
    patched = getattr(norm, "weight_function", None) or getattr(norm, "bias_function", None)
    return isinstance(weight, Tensor) and weight.device == x.device and not patched and kernels.fuses(x)


def group_normed(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, silu: bool = False) -> Tensor:
    """The norm of maps x [R, C, h, w], before it a shift [S, C] of the rows, after it SiLU."""
    if norm_is_kernel(x, norm):
        return kernels.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, shift, silu)
    x = narrowed(x, norm)
    if shift is not None:
        if len(shift) > 1:
            shift = shift.repeat_interleave(len(x) // len(shift), dim=0)
        x = x + shift[:, :, None, None]
    x = norm(x)
    return F.silu(x) if silu else x


def layer_normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm of tokens x [R, N, C]."""
    if norm_is_kernel(x, norm):
        return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(narrowed(x, norm))


def add_layer_normed(norm: nn.LayerNorm, x: Tensor, y: Tensor, carried: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual sum of tokens x + y, carried in that format, and its norm."""
    if norm_is_kernel(x, norm):
        return kernels.add_norm(x, y, norm.bias[None], norm.weight[None], norm.eps, carried, False)
    x = x + y
    return x, layer_normed(norm, x)


def added(x: Tensor, y: Tensor, norm: Any) -> Tensor:
    """x + y for what reads the norm's format."""
    return kernels.add(x, y, norm.weight.dtype) if norm_is_kernel(x, norm) else narrowed(x + y, norm)


def residual(x: Tensor, y: Tensor, norm: Any, carried: torch.dtype | None = None) -> Tensor:
    """x + y in the format of x, or in a finer one."""
    if norm_is_kernel(x, norm):
        return kernels.add(x, y, x.dtype if carried is None else carried)
    return (x if carried is None else x.to(carried)) + y


def in_full(layer: Any, x: Tensor) -> Tensor:
    """What a layer makes of x in x's own format, where that is finer than the layer's weights."""
    if type(layer) not in (nn.GroupNorm, nn.Conv2d) or layer.weight.dtype.itemsize >= x.dtype.itemsize:
        return layer(x)  # a host's layers bring their weights to x's format by themselves
    return functional_call(layer, {name: weight.to(x.dtype) for name, weight in layer.named_parameters()}, (x,))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    batch, heads, tokens, dim = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * dim)


def into_place(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer's answer to x is better written into a part of a larger tensor than copied there."""
    return type(layer) is nn.Linear and layer.weight.dtype == x.dtype and kernels.fuses(x)


def linear_into(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    """What a linear layer makes of x [..., C], written into `out`, whose rows follow each other in memory."""
    width = out.shape[-1]
    torch.addmm(layer.bias, x.reshape(-1, x.shape[-1]), layer.weight.t(), out=out.view(-1, width))
    return out


class FusedLinear(nn.Linear):
    """Linear layers that read the same tokens, as one matrix product.

    Args:
        layers: by name; they have one input width, and all or none a bias.
    """

    def __init__(self, layers: dict[str, nn.Linear]):
        parts = list(layers.values())
        width, bias = parts[0].in_features, parts[0].bias is not None
        super().__init__(width, sum(part.out_features for part in parts), bias, device="meta")
        self.names, self.widths = tuple(layers), [part.out_features for part in parts]
        self.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)

    def forward(self, x: Tensor, names: tuple[str, ...] = ()) -> Any:
        """What the layers of these names, neighbours in their order, make of x."""
        start = self.names.index(names[0])
        before, widths = sum(self.widths[:start]), self.widths[start : start + len(names)]
        rows = slice(before, before + sum(widths))
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows]).split(widths, dim=-1)


def fuse(module: nn.Module, *names: str) -> None:
    """Joins linear layers of a module into a `FusedLinear`, which takes their weights over."""
    joined = FusedLinear({name: getattr(module, name) for name in names})
    module.fused = nn.ModuleList([*getattr(module, "fused", ()), joined])
    for name in names:
        delattr(module, name)


def project(module: nn.Module, names: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
    """x through a module's linear layers of these names, fused or not."""
    for joined in getattr(module, "fused", ()):
        if names[0] in joined.names:
            return joined(x, names)
    return tuple(getattr(module, name)(x) for name in names)


_fused: ContextVar[bool | None] = ContextVar("fused", default=None)
SCORES = 2**28  # bytes of attention's scores at once, where no fused kernel spares making them


@contextmanager
def attention_fused(fused: bool) -> Iterator[None]:
    """Inside, attention is computed in pieces or not, whatever the tensors' device can do."""
    token = _fused.set(fused)
    try:
        yield
    finally:
        _fused.reset(token)


def attention_is_fused(device: torch.device) -> bool:
    """Whether `attend` leaves all of it to one kernel of torch there."""
    chosen = _fused.get()
    return devices.of(device).fused_attention if chosen is None else chosen


# As torch.compiler.assume_constant_result, which would import the compiler: tracing asks it, and does not trace it.
attention_is_fused.__dict__["_dynamo_marked_constant"] = True


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of queries [B, H, N, D] to keys and values [B, H, M, D].

    By rows and heads, and within those by queries, where the device has no fused kernel: all scores at once are 17 GB
    in the released net at 512 x 512.
    """
    if attention_is_fused(query.device):
        return F.scaled_dot_product_attention(query, key, value)
    batch, heads, queries, _ = query.shape
    each = 4 * key.shape[2]  # bytes of a query's scores, in float32
    at_once = max(1, min(queries, SCORES // each))
    rows = max(1, SCORES // (each * queries))  # of batch and heads together
    if rows >= batch * heads:
        return F.scaled_dot_product_attention(query, key, value)
    out = query.new_empty(batch, heads, queries, value.shape[-1])
    for row in range(batch):
        for head in range(0, heads, rows):
            which = slice(head, head + rows)
            for start in range(0, queries, at_once):
                part = slice(start, start + at_once)
                out[row, which, part] = F.scaled_dot_product_attention(
                    query[row, which, part], key[row, which], value[row, which]
                )
    return out


QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
KeysValues = tuple[Tensor, Tensor]  # [B, H, M, D] each


class Attention(nn.Module):
    """Multi-head attention of [B, N, query_dim] tokens; head width is inner_dim / heads."""

    to_out: Any

    def __init__(self, query_dim: int, inner_dim: int, heads: int, context_dim: int | None = None, ops: Any = nn):
        super().__init__()
        self.heads, self.of_context = heads, context_dim is not None
        context_dim = query_dim if context_dim is None else context_dim
        self.to_q = ops.Linear(query_dim, inner_dim, bias=False)
        self.to_k = ops.Linear(context_dim, inner_dim, bias=False)
        self.to_v = ops.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.ModuleList([ops.Linear(inner_dim, query_dim)])

    def fuse(self) -> None:
        """One matrix product for all that is made of the same tokens."""
        fuse(self, *(("to_k", "to_v") if self.of_context else QUERY_KEY_VALUE))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of tokens [B, M, context_dim]; what does not change between steps is projected once and handed to `cross`."""
        key, value = project(self, ("to_k", "to_v"), context)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def cross(self, x: Tensor, given: KeysValues) -> Tensor:
        """Attention of x to the given keys and values alone, x [B, N, query_dim]."""
        (query,) = project(self, ("to_q",), x)
        return self._attend(query, given)

    def folded(self, context: Tensor) -> KeysValues | None:
        """For `cross`, of a few tokens [B, M, context_dim]: what queries and outputs are projected by, multiplied with
        keys and values once, [B, query_dim, H * M] and [B, H * M, query_dim]. None where the kernels do not run.
        """
        to_q, to_out = self.to_q, self.to_out[0]
        if not (into_place(to_q, context) and type(to_out) is nn.Linear):
            return None
        key, value = (part.float() for part in self.keys_values(context))  # [B, H, M, D]
        query = to_q.weight.float().unflatten(0, (self.heads, -1)) * key.shape[-1] ** -0.5  # [H, D, C]
        out = to_out.weight.float().unflatten(1, (self.heads, -1))  # [C, H, D]
        ask = torch.einsum("hdc,bhmd->bchm", query, key).flatten(2)
        answer = torch.einsum("bhmd,chd->bhmc", value, out).flatten(1, 2)
        return ask.to(context.dtype), answer.to(context.dtype)

    def cross_folded(self, x: Tensor, given: KeysValues) -> Tensor:
        """As `cross`, with what `folded` gave."""
        scores = torch.bmm(x, given[0]).unflatten(2, (self.heads, -1))
        weights = scores.softmax(dim=-1).flatten(2)
        return torch.baddbmm(self.to_out[0].bias.expand(*x.shape[:2], -1), weights, given[1])

    def forward(self, x: Tensor, more: KeysValues | None = None, into: Tensor | None = None) -> Tensor:
        """Self-attention of x [S * F, N, query_dim], also to `more` keys and values [S, K, H, M, D]: K sets for each of
        S samples, of which its frames see set k in frames k, k + K, ...; written `into` a tensor if one is given.
        """
        query, *own = project(self, QUERY_KEY_VALUE, x)
        key, value = (split_heads(part, self.heads) for part in own)
        if more is not None:
            key, value = (self._joined(own, others) for own, others in zip((key, value), more, strict=True))
        return self._attend(query, (key, value), into)

    @staticmethod
    def _joined(own: Tensor, more: Tensor) -> Tensor:
        """[S * F, H, N, D] and [S, K, H, M, D] -> [S * F, H, N + M, D], in one copy."""
        samples, sets = more.shape[:2]
        own = own.unflatten(0, (samples, -1, sets))
        return torch.cat([own, more[:, None].expand(-1, own.shape[1], -1, -1, -1, -1)], dim=4).flatten(0, 2)

    def _attend(self, query: Tensor, given: KeysValues, into: Tensor | None = None) -> Tensor:
        attention = join_heads(attend(split_heads(query, self.heads), *given))
        return self.to_out[0](attention) if into is None else linear_into(self.to_out[0], attention, into)


class GEGLU(nn.Module):
    """Gated linear unit with GELU, the first half of the feed-forward layer."""

    def __init__(self, dim: int, inner_dim: int, ops: Any = nn):
        super().__init__()
        self.proj = ops.Linear(dim, inner_dim * 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., inner_dim]."""
        if kernels.fuses(x):
            if type(self.proj) is nn.Linear and self.proj.weight.dtype == x.dtype:
                return kernels.geglu_linear(x, self.proj.weight, self.proj.bias)
            return kernels.geglu(self.proj(x))
        x = self.proj(x)
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


FEED_FORWARD_TOKENS = {True: 1024, False: 65536}  # at once, on a CPU and elsewhere


class FeedForward(nn.Module):
    """Position-wise feed-forward layer of width 4 * dim."""

    net: Any

    def __init__(self, dim: int, ops: Any = nn):
        super().__init__()
        # The checkpoint numbers a dropout layer in between.
        self.net = nn.ModuleList([GEGLU(dim, dim * 4, ops), nn.Identity(), ops.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> the same."""
        most = FEED_FORWARD_TOKENS[x.device.type == "cpu"]
        if torch.is_grad_enabled() or x[..., 0].numel() <= most:
            return self.net[2](self.net[0](x))
        # In pieces, because 12 times the width of all tokens at once is the most that a step holds; the CPU's pieces
        # fit its cache.
        pieces, last = x.flatten(0, -2).split(most), self.net[2]
        if into_place(last, x):
            out = torch.empty_like(x).view(-1, x.shape[-1])
            for piece, place in zip(pieces, out.split(most)):
                linear_into(last, self.net[0](piece), place)
            return out.view(x.shape)
        return torch.cat([last(self.net[0](piece)) for piece in pieces]).view(x.shape)


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep (cosines first), then two linear layers; [B] -> [B, 4 * channels]."""

    def __init__(self, channels: int, ops: Any = nn):
        super().__init__()
        self.channels = channels
        self.linear_1 = ops.Linear(channels, channels * 4)
        self.linear_2 = ops.Linear(channels * 4, channels * 4)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep [B] -> [B, 4 * channels] in `dtype`."""
        half = self.channels // 2
        frequency = torch.exp(
            -math.log(10000.0) / half * torch.arange(half, device=timestep.device, dtype=torch.float32)
        )
        angle = timestep.float()[:, None] * frequency[None]
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions on [R, C, h, w], shifted by the time embedding in between; residual."""

    # As `module.LayerModule` declares it.
    recomputed: ClassVar[bool] = True
    outside_forward: ClassVar[tuple[str, ...]] = ("shift",)

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int, eps: float, ops: Any = nn):
        super().__init__()
        self.norm1 = ops.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = ops.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = ops.Linear(time_dim, out_channels)
        self.norm2 = ops.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = ops.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = ops.Conv2d(in_channels, out_channels, 1)

    def shift(self, time: Tensor) -> Tensor:
        """What the time embedding [T, time_dim] adds between the convolutions, [T, out_channels]."""
        return self.time_emb_proj(F.silu(time))

    def forward(self, x: Tensor, shift: Tensor, carried: torch.dtype | None = None) -> Tensor:
        """x [R, C, h, w]; shift [S, out_channels], S dividing R: row r is shifted by the one numbered r // (R / S).
        carried: the format of what comes back, where it is finer than that of x.
        """
        hidden = self.conv1(group_normed(self.norm1, x, silu=True))
        hidden = self.conv2(group_normed(self.norm2, hidden, shift, silu=True))
        shortcut = self.conv_shortcut(narrowed(x, self.norm1)) if hasattr(self, "conv_shortcut") else x
        return residual(shortcut, hidden, self.norm1, carried)


class Downsample(nn.Module):
    """3x3 convolution with stride 2."""

    def __init__(self, channels: int, ops: Any = nn):
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [R, C, h, w] -> [R, C, h / 2, w / 2], rounded up."""
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size` (h, w), then a 3x3 convolution."""

    def __init__(self, channels: int, ops: Any = nn):
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x [R, C, h, w] -> [R, C, *size]."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def to_tokens(x: Tensor) -> Tensor:
    """[R, C, h, w] -> [R, h * w, C], contiguous: every layer that follows would copy what is not."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_maps(x: Tensor, height: int, width: int) -> Tensor:
    """[R, h * w, C] -> [R, C, h, w], a view (channels last in memory)."""
    return x.transpose(1, 2).unflatten(2, (height, width))
