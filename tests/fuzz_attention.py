"""Source of random attention-like modules: spellings, facets and mistakes, one choice each.

Every function writes lines through a `Writer`; `pick(*options)` decides, the plainest option
first, so that a failure shrinks to plain code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

Pick = Callable[..., Any]


class Writer:
    """A module in the making: lines of `__init__` and `forward`, and what was chosen."""

    def __init__(self, pick: Pick) -> None:
        self.pick = pick
        self.init: list[str] = []
        self.body: list[str] = []
        self.inputs: dict[str, str] = {}  # name -> an expression of the sizes b, n and m
        self.functions: set[str] = set()
        self.unguarded = self.rough = False
        self._count = 0

    def let(self, stem: str, expression: str) -> str:
        """A local variable of forward; returns its name."""
        name = self._name(stem)
        self.body.append(f"{name} = {expression}")
        return name

    def layer(self, stem: str, expression: str) -> str:
        """An attribute of the module; returns how forward reads it."""
        name = self._name(stem)
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def parameter(self, *sizes: int) -> str:
        """A learned tensor."""
        return self.layer("weight", f"nn.Parameter(torch.randn({', '.join(map(str, sizes))}))")

    def take(self, name: str, expression: str) -> str:
        """An input of the model."""
        self.inputs[name] = expression
        return name

    def one_in(self, chances: int) -> bool:
        """True once in so many."""
        return bool(self.pick(*[False] * (chances - 1), True)) if chances > 1 else True

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of an attention, and how its scores lie: 4 axes, heads merged, or heads in groups."""

    heads: int
    kept: int  # heads of keys and values
    features: int
    layout: str = "split"  # "split" (b, h, i, j), "merged" (b*h, i, j), "grouped" (b, g, r, i, j)
    flipped: bool = False  # scores (j, i)

    @property
    def width(self) -> int:
        return self.heads * self.features

    @property
    def repeats(self) -> int:
        return self.heads // self.kept

    def oriented(self, mask: str) -> str:
        """A tensor (..., i, j) in the order of the scores."""
        return f"({mask}).mT" if self.flipped else mask

    def per_row(self, kept: str) -> str:
        """A tensor (b, j) that broadcasts to the scores (..., i, j)."""
        return {"split": f"{kept}[:, None, None, :]",
                "grouped": f"{kept}[:, None, None, None, :]",
                "merged": f"{kept}.repeat_interleave({self.heads}, 0)[:, None, :]"}[self.layout]

    def per_head(self, values: str, batch: str) -> str:
        """A tensor (h, i, j) or (h, 1, 1) that broadcasts to the scores."""
        return {"split": values,
                "grouped": f"{values}.unflatten(0, ({self.kept}, {self.repeats}))",
                "merged": f"{values}.repeat({batch}, 1, 1)"}[self.layout]


SPLITS = (
    "{t}.view({t}.shape[0], {t}.shape[1], {h}, {d}).transpose(1, 2)",
    "{t}.unflatten(-1, ({h}, {d})).transpose(1, 2)",
    "{t}.reshape({t}.shape[0], -1, {h}, {d}).permute(0, 2, 1, 3)",
    "torch.stack({t}.chunk({h}, -1), 1)",
    "torch.stack([{t}[..., i * {d}:(i + 1) * {d}] for i in range({h})], 1)",
    "{t}.unflatten(-1, ({d}, {h})).permute(0, 3, 1, 2)",
    "{t}.mT.unflatten(1, ({h}, {d})).mT",
    "{t}[:, None].unflatten(-1, ({h}, {d})).transpose(1, 3)[:, :, :, 0]",
)
FUSED = (
    "{t}.chunk(3, -1)", "{t}.split({c}, -1)", "{t}.tensor_split(3, -1)",
    "({t}[..., :{c}], {t}[..., {c}:2 * {c}], {t}[..., 2 * {c}:])",
)
FUSED_AND_SPLIT = (
    "{t}.unflatten(-1, (3, {h}, {d})).permute(2, 0, 3, 1, 4).unbind(0)",
    "{t}.unflatten(-1, (3, {h}, {d})).permute(2, 0, 3, 1, 4)",
    "{t}.unflatten(-1, ({h}, 3 * {d})).transpose(1, 2).chunk(3, -1)",
    "{t}.unflatten(-1, ({h}, 3, {d})).transpose(1, 2).unbind(-2)",
    "[{t}.view({t}.shape[0], -1, 3, {h}, {d})[:, :, i].transpose(1, 2) for i in range(3)]",
)


def projected(w: Writer, x: str, y: str, g: Geometry) -> tuple[str, str, str]:
    """Queries (b, h, i, d) of x, keys and values (b, kept, j, d) of y."""
    options = ["separate", "separate", "conv", "einsum", "addmm", "none", "fused_kv", "heads"]
    if x == y and g.kept == g.heads:
        options[2:2] = ["fused", "fused", "fused_and_split"]
    how = w.pick(*options)
    if how == "none":
        count = g.kept * g.features
        return (_split(w, x, g.heads, g), *(_split(w, w.let("kv", f"{y}[..., -{count}:]"), g.kept,
                                                   g) for _ in range(2)))
    if how.startswith("fused"):
        return _fused(w, how, x, y, g)
    made = {"separate": _linear, "conv": _conv, "einsum": _einsum, "addmm": _addmm,
            "heads": _head_modules}[how]
    q, k, v = (made(w, source, heads, g)
               for source, heads in ((x, g.heads), (y, g.kept), (y, g.kept)))
    return q, k, v


def _split(w: Writer, tensor: str, heads: int, g: Geometry) -> str:
    return w.let("t", w.pick(*SPLITS).format(t=tensor, h=heads, d=g.features))


def _linear(w: Writer, source: str, heads: int, g: Geometry) -> str:
    bias = w.pick("", ", bias=False")
    layer = w.layer("linear", f"nn.Linear({g.width}, {heads * g.features}{bias})")
    return _split(w, w.let("p", f"{layer}({source})"), heads, g)


def _conv(w: Writer, source: str, heads: int, g: Geometry) -> str:
    layer = w.layer("conv", f"nn.Conv1d({g.width}, {heads * g.features}, 1)")
    flat = w.let("p", f"{layer}({source}.transpose(1, 2))")
    return w.let("t", f"{flat}.unflatten(1, ({heads}, {g.features})).transpose(2, 3)")


def _einsum(w: Writer, source: str, heads: int, g: Geometry) -> str:
    weight = w.parameter(g.width, heads, g.features)
    scaled = f"{weight} * {g.width} ** -0.5"
    return w.let("t", f'torch.einsum("bnc,chd->bhnd", {source}, {scaled})')


def _addmm(w: Writer, source: str, heads: int, g: Geometry) -> str:
    weight, bias = (w.parameter(*s) for s in ((g.width, heads * g.features),
                                              (heads * g.features,)))
    flat = f"torch.addmm({bias}, {source}.reshape(-1, {g.width}), {weight}, alpha=0.3)"
    return _split(w, w.let("p", f"{flat}.view({source}.shape[0], -1, {heads * g.features})"),
                  heads, g)


def _head_modules(w: Writer, source: str, heads: int, g: Geometry) -> str:
    layers = w.layer("each", f"nn.ModuleList(nn.Linear({g.width}, {g.features}) "
                             f"for _ in range({heads}))")
    return w.let("t", f"torch.stack([layer({source}) for layer in {layers}], 1)")


def _fused(w: Writer, how: str, x: str, y: str, g: Geometry) -> tuple[str, str, str]:
    if how == "fused_kv":
        width = g.kept * g.features
        layer = w.layer("kv", f"nn.Linear({g.width}, {2 * width})")
        k, v = (w.let("p", f"{layer}({y})[..., {i} * {width}:{i + 1} * {width}]")
                for i in range(2))
        return _linear(w, x, g.heads, g), _split(w, k, g.kept, g), _split(w, v, g.kept, g)
    layer = w.layer("qkv", f"nn.Linear({g.width}, {3 * g.width})")
    fused = w.let("f", f"{layer}({x})")
    parts = w.pick(*(FUSED if how == "fused" else FUSED_AND_SPLIT))
    names = [w._name("u") for _ in range(3)]
    w.body.append(f"{', '.join(names)} = "
                  + parts.format(t=fused, c=g.width, h=g.heads, d=g.features))
    if how == "fused":
        names = [_split(w, name, g.heads, g) for name in names]
    return names[0], names[1], names[2]


ROTATIONS = {
    "half": "{t} * {a}.cos().repeat(1, 2) + rotated_half({t}) * {a}.sin().repeat(1, 2)",
    "interleaved": "{t} * {a}.cos().repeat_interleave(2, -1) + rotated_pairs({t}) "
                   "* {a}.sin().repeat_interleave(2, -1)",
    "complex": "torch.view_as_real(torch.view_as_complex({t}.contiguous().unflatten(-1, (-1, 2)))"
               " * torch.polar(torch.ones_like({a}), {a})).flatten(-2)",
}
NORMS = (
    "functional.layer_norm({t}, ({d},))", "functional.normalize({t}, dim=-1)",
    "{t} * torch.rsqrt({t}.pow(2).mean(-1, keepdim=True) + 1e-6)",
    "functional.rms_norm({t}, ({d},))", "{t} / {t}.norm(dim=-1, keepdim=True).clamp_min(1e-6)",
)


def positioned(w: Writer, q: str, k: str, g: Geometry) -> tuple[str, str]:
    """Queries and keys with rotary positions or norms, sometimes."""
    if w.one_in(5):
        norm = w.pick(*NORMS)
        q, k = (w.let("t", norm.format(t=t, d=g.features)) for t in (q, k))
    if g.features % 2 == 0 and w.one_in(5):
        kind = w.pick(*ROTATIONS)
        w.functions.add({"half": "rotated_half", "interleaved": "rotated_pairs"}.get(kind, ""))
        half = g.features // 2
        q, k = (w.let("t", ROTATIONS[kind].format(t=t, a=w.let(
            "angle", f"torch.arange({t}.shape[-2]).to({t}.dtype)[:, None] * 10.0 ** "
                     f"-torch.arange({half}).to({t}.dtype)"))) for t in (q, k))
    return q, k


REPEATS = (
    "{t}.repeat_interleave({r}, 1)", "{t}[:, :, None].expand(-1, -1, {r}, -1, -1).flatten(1, 2)",
    "{t}[:, :, None].expand(-1, -1, {r}, -1, -1).reshape({t}.shape[0], {h}, -1, {d})",
    "{t}.repeat(1, {r}, 1, 1)", "torch.cat([{t}] * {r}, 1)",
)


def laid_out(w: Writer, q: str, k: str, v: str, g: Geometry) -> tuple[str, str, str]:
    """Queries, keys and values in the layout of the scores."""
    if g.layout == "grouped":
        return (w.let("q", f"{q}.unflatten(1, ({g.kept}, {g.repeats}))"),
                w.let("k", f"{k}[:, :, None]"), w.let("v", f"{v}[:, :, None]"))
    if g.repeats > 1 and not (g.kept == 1 and g.layout == "split" and w.one_in(2)):
        repeat = w.pick(*REPEATS)
        k, v = (w.let("r", repeat.format(t=t, r=g.repeats, h=g.heads, d=g.features))
                for t in (k, v))
    if g.layout == "merged":
        merge = w.pick("{t}.flatten(0, 1)", "{t}.reshape(-1, {t}.shape[2], {d})")
        q, k, v = (w.let("m", merge.format(t=t, d=g.features)) for t in (q, k, v))
    return q, k, v


PRODUCTS = {
    "split": ("{q} @ {k}.transpose(-2, -1)", "torch.matmul({q}, {k}.mT)",
              "torch.einsum('bhid,bhjd->bhij', {q}, {k})", "{q} @ {k}.permute(0, 1, 3, 2)",
              "({k} @ {q}.mT).mT", "torch.einsum('...id,...jd->...ij', {q}, {k})",
              "({q}[..., :, None, :] * {k}[..., None, :, :]).sum(-1)"),
    "merged": ("torch.bmm({q}, {k}.transpose(1, 2))", "{q} @ {k}.mT",
               "torch.einsum('zid,zjd->zij', {q}, {k})",
               "torch.baddbmm(torch.zeros(1, 1, 1, dtype={q}.dtype), {q}, {k}.mT, beta=0, "
               "alpha=0.4)"),
    "grouped": ("{q} @ {k}.transpose(-2, -1)", "torch.matmul({q}, {k}.mT)",
                "torch.einsum('bgrid,bgjd->bgrij', {q}, {k}[:, :, 0])"),
}
VALUES = {
    "split": ("{p} @ {v}", "torch.matmul({p}, {v})", "torch.einsum('bhij,bhjd->bhid', {p}, {v})",
              "({v}.mT @ {p}.mT).mT"),
    "merged": ("torch.bmm({p}, {v})", "{p} @ {v}"),
    "grouped": ("{p} @ {v}", "torch.einsum('bgrij,bgjd->bgrid', {p}, {v}[:, :, 0])"),
}


def product(w: Writer, q: str, k: str, g: Geometry) -> str:
    """The scores."""
    if g.flipped:
        return w.let("s", f"{k} @ {q}.mT")
    options = PRODUCTS[g.layout]
    if g.kept != g.heads:  # keys of one head broadcast; einsum wants equal sizes
        options = tuple(o for o in options if "'bhid" not in o)
    return w.let("s", w.pick(*options).format(q=q, k=k))


def weighed(w: Writer, p: str, v: str, g: Geometry) -> str:
    """Probabilities times values."""
    if g.flipped:
        return w.let("o", w.pick(f"({v}.mT @ {p}).mT", f"{p}.mT @ {v}"))
    options = VALUES[g.layout]
    if g.kept != g.heads:
        options = tuple(o for o in options if "'bhij" not in o)
    return w.let("o", w.pick(*options).format(p=p, v=v))


MERGES = (
    "{o}.transpose(1, 2).reshape({o}.shape[0], -1, {c})", "{o}.transpose(1, 2).flatten(2)",
    "{o}.permute(0, 2, 1, 3).contiguous().view({o}.shape[0], {o}.shape[2], {c})",
    "torch.cat({o}.unbind(1), -1)", "{o}.mT.flatten(1, 2).mT",
)


def merged(w: Writer, out: str, batch: str, g: Geometry) -> str:
    """The heads side by side again, (b, i, width), projected."""
    if g.layout == "grouped":
        out = w.let("o", f"{out}.flatten(1, 2)")
    if g.layout == "merged":
        out = w.let("o", f"{out}.view({batch}, {g.heads}, -1, {g.features})")
    if w.one_in(6):
        weight = w.parameter(g.heads, g.features, g.width)
        return w.let("o", f'torch.einsum("bhnd,hdc->bnc", {out}, {weight})')
    out = w.let("o", w.pick(*MERGES).format(o=out, c=g.width))
    if w.one_in(4):
        return out
    return w.let("o", f"{w.layer('out', f'nn.Linear({g.width}, {g.width})')}({out})")
