"""Source of whole random models: what is around attentions and look-ups, and their inputs."""

from __future__ import annotations

from textwrap import indent

from fuzz_attention import Geometry, Pick, Writer
from fuzz_scores import attention

HEAD = """\
import math

import torch
from torch import nn
from torch.nn import functional
"""
FUNCTIONS = {
    "rotated_half": "def rotated_half(t):\n"
                    "    first, second = t.chunk(2, -1)\n"
                    "    return torch.cat((-second, first), -1)\n",
    "rotated_pairs": "def rotated_pairs(t):\n"
                     "    return torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2)\n",
}
SIZES = ("((2, 7), (3, 11), (1, 4))", "((2, 5), (5, 2), (1, 1))", "((2, 2), (3, 5), (2, 1))",
         "((3, 4), (4, 3), (1, 13))", "((1, 6), (2, 6), (3, 1))", "((4, 8), (2, 3), (8, 4))")
ROWS = 11
KINDS = ("written", "tables", "layers")


def source_of(kind: str, pick: Pick) -> str:
    """The text of a module that holds `Model`, `inputs(b, n)` and what `fuzz.check` reads.

    One in three is captured with sizes that may vary: torch takes three times as long for it.
    """
    w = Writer(pick)
    crossed = {"written": written, "tables": tables, "layers": layers}[kind](w)
    w.functions.discard("")
    parameters = ", ".join(["self", *w.inputs])
    values = ", ".join(w.inputs.values()) + ","
    parts = [
        HEAD, f"SIZES = {pick(*SIZES)}", f"DYNAMIC = {pick(False, False, True)}",
        f"DTYPE = torch.{pick(*['float32'] * 3, 'float64')}",
        f"UNGUARDED = {w.unguarded}  # exp without its maximum: overflow is the model's own",
        f"ROUGH = {w.rough}  # scores near -1e4 or -1e9, that keep fewer digits", "",
        *(f"\n{FUNCTIONS[name]}" for name in sorted(w.functions)),
        "\nclass Model(nn.Module):", "    def __init__(self):", "        super().__init__()",
        indent("\n".join(w.init), " " * 8), "", f"    def forward({parameters}):",
        indent("\n".join(w.body), " " * 8), "",
        "\ndef inputs(b, n):", f"    m = {'n + 2' if crossed else 'n'}",
        "    torch.manual_seed(b * 100 + n)", f"    return ({values})", ""]
    return "\n".join(parts)


def returned(w: Writer, result: str, more: list[str]) -> None:
    """What forward gives back, and in which structure."""
    extra = w.pick(*[[]] * 6, ["views"], ["input"], ["twice"], ["number"])
    first = next(iter(w.inputs))
    results = [result, *more]
    results += {"views": [f"{result}[:, :1]"], "input": [first], "twice": [result],
                "number": [f"{first}.shape[0]"]}[extra[0]] if extra else []
    form = w.pick("tuple", "dict", "list", "nested")
    joined = ", ".join(results)
    pairs = ", ".join(f'"r{i}": {r}' for i, r in enumerate(results))
    w.body.append(f"return {result}" if len(results) == 1 and form == "tuple" else {
        "tuple": f"return {joined}", "dict": f"return {{{pairs}}}", "list": f"return [{joined}]",
        "nested": f"return ({{{pairs}}}, [None])"}[form])


def geometry(w: Writer) -> Geometry:
    """Random sizes and layout."""
    heads, kept = w.pick((2, 2), (2, 2), (1, 1), (3, 3), (4, 2), (2, 1), (4, 1))
    layout = w.pick("split", "split", "split", "merged", "grouped" if kept != heads else "split")
    return Geometry(heads, kept, w.pick(4, 4, 8, 6, 1, 5), layout, w.one_in(8))


def written(w: Writer) -> bool:
    """One or two attentions written by hand, with what stands around them; True if crossed."""
    g = geometry(w)
    crossed = w.one_in(4)
    x = embedded(w, g.width) if w.one_in(4) else w.take("x", f"torch.randn(b, n, {g.width})")
    y = w.take("y", f"torch.randn(b, m, {g.width})") if crossed else x
    more: list[str] = []
    for _ in range(1 if w.one_in(2) else w.pick(1, 2)):
        start = x
        if w.one_in(3):
            x = w.let("x", f"{w.layer('norm', f'nn.LayerNorm({g.width})')}({x})")
            y = y if crossed else x
        x, extra = attention(w, x, y, g)
        more = more or extra
        x = surrounded(w, x, start, g.width)
        y = y if crossed else x
    returned(w, x, more)
    return crossed


def surrounded(w: Writer, out: str, x: str, width: int) -> str:
    """Residuals, norms, feed-forward layers, operators in place, dead code."""
    how = w.pick("", "residual", "post", "forward", "place", "dead", "gate")
    if how == "post":
        return w.let("x", f"{w.layer('norm', f'nn.LayerNorm({width})')}({x} + {out})")
    if how == "forward":
        layer, back = (w.layer("linear", f"nn.Linear({a}, {b})")
                       for a, b in ((width, 7), (7, width)))
        return w.let("x", f"{x} + {back}(functional.gelu({layer}({out})))")
    if how == "place":
        w.body.append(w.pick(f"{out}.add_(1.0)", f"{out} += {x}", f"{out}[:, 0] = 0.5",
                             f"{out}[..., 0].mul_(2)"))
        return out
    if how == "dead":
        w.let("dead", f"torch.softmax({out} @ {out}.mT, -1) @ {out}")
        return out
    if how == "gate":
        return w.let("x", f"{out} * torch.sigmoid({x})")
    return w.let("x", f"{x} + {out}") if how == "residual" else out


LOOK_UPS = (
    "{layer}({ids})", "functional.embedding({ids}, {table})", "{table}[{ids}]",
    "{table}.index_select(0, {ids}.flatten()).view(*{ids}.shape, -1)",
    "functional.one_hot({ids}, {rows}).to({table}.dtype) @ {table}",
    "{table}.gather(0, {ids}.flatten()[:, None].expand(-1, {width})).view(*{ids}.shape, -1)",
    "{table}[{ids} - {rows}]", "{table}[{ids}, :]", "{table}.T[:, {ids}].permute(1, 2, 0)",
    "functional.linear(functional.one_hot({ids}, {rows}).to({table}.dtype), {table}.T)",
    "({ids}[..., None] == torch.arange({rows})).to({table}.dtype) @ {table}",
    "torch.take_along_dim({table}, {ids}.reshape(-1, 1), 0).unflatten(0, {ids}.shape)",
    "functional.embedding({ids}, {table}, padding_idx=2)",
)


def embedded(w: Writer, width: int, ids: str = "") -> str:
    """Vectors (b, n, width) of ids, in some spelling, perhaps with positions."""
    ids = ids or w.take("ids", f"torch.randint({ROWS}, (b, n))")
    options = w.pick("", ", padding_idx=3")
    layer = w.layer("table", f"nn.Embedding({ROWS}, {width}{options})")
    look_up = w.pick(*LOOK_UPS)
    x = w.let("x", look_up.format(layer=layer, table=f"{layer}.weight", ids=ids, rows=ROWS,
                                  width=width))
    if w.one_in(3):
        table = w.layer("positions", f"nn.Embedding(64, {width})")
        at = f"torch.arange({ids}.shape[1])"
        x = w.let("x", f"{x} + " + w.pick(f"{table}({at})", f"{table}.weight[:{ids}.shape[1]]",
                                          f"{table}({at}[None].expand_as({ids}))",
                                          f"{table}.weight[{at}]"))
    return w.let("x", f"{x} * {width} ** 0.5") if w.one_in(6) else x


BAGS = ("sum", "mean", "max")


def tables(w: Writer) -> bool:
    """Look-ups and bags alone or together, shared tables, tied heads."""
    width = w.pick(4, 8, 1, 5)
    how = w.pick("plain", "bag", "by hand", "shared", "tied", "deep", "computed", "offsets")
    if how == "bag" or how == "offsets":
        returned(w, _bag(w, width, how), [])
        return False
    ids = w.take("ids", f"torch.randint({ROWS}, (b, n))")
    x = embedded(w, width, ids)
    more: list[str] = []
    if how == "by hand":
        w.take("kept", "(torch.arange(n) + torch.arange(b)[:, None]) % 3 != 1")
        x = w.let("x", w.pick(f"{x}.sum(1, keepdim=True)", f"{x}.mean(1, keepdim=True)",
                              f"{x}.amax(1, keepdim=True)",
                              f"({x} * kept[..., None]).sum(1, keepdim=True)",
                              f"torch.where(kept[..., None], {x}, 0).sum(1)[:, None]"))
    elif how == "shared":
        layer = w.layer("both", f"nn.Embedding({ROWS}, {width})")
        more = [w.let("x", f"{layer}({ids}.flip(1))"), w.let("x", f"{layer}({ids} * 0 + 1)")]
    elif how == "tied":
        layer = w.layer("both", f"nn.Embedding({ROWS}, {width})")
        x = w.let("x", f"torch.tanh({layer}({ids}) + {x})")
        more = [w.let("x", f"functional.linear({x}, {layer}.weight)")]
    elif how == "deep":
        table = w.parameter(ROWS, 2, width)
        more = [w.let("x", w.pick(f"{table}[{ids}]", f"{table}[{ids}].flatten(2)",
                                  f"{table}.flatten(1)[{ids}]", f"{table}[:, 1][{ids}]"))]
    elif how == "computed":
        more = [embedded(w, width, w.let("ids", w.pick(
            f"({ids} * 7 + 3) % {ROWS}", f"{ids}.clamp(1, 5)", f"{ids}.argsort(1) % {ROWS}",
            f"{ids} // 2", f"{ids}.where({ids} > 3, torch.zeros_like({ids}))",
            f"{ids}[:, :1].expand_as({ids})")))]
    returned(w, x, more)
    return False


def _bag(w: Writer, width: int, how: str) -> str:
    mode = w.pick(*BAGS)
    options = w.pick("", ", padding_idx=2") + (
        ", include_last_offset=True" if how == "offsets" and w.one_in(3) else "")
    layer = w.layer("bag", f'nn.EmbeddingBag({ROWS}, {width}, mode="{mode}"{options})')
    if how == "offsets":
        ids = w.take("ids", f"torch.randint({ROWS}, (n + 3,))")
        last = "torch.cat((torch.arange(b) * (n // b), torch.tensor([n + 3])))"
        w.take("offsets", last if "last" in options else "torch.arange(b) * ((n + 3) // b)")
        return w.let("x", f"{layer}({ids}, offsets)[:, None]")
    ids = w.take("ids", f"torch.randint({ROWS}, (b, n))")
    if mode == "sum" and w.one_in(2):
        w.take("weights", "torch.randn(b, n)")
        return w.let("x", f"{layer}({ids}, per_sample_weights=weights)[:, None]")
    return w.let("x", f"{layer}({ids})[:, None]")


def layers(w: Writer) -> bool:
    """torch's own attention layers."""
    heads, features = w.pick((2, 4), (1, 4), (4, 2), (3, 5))
    width = heads * features
    crossed = w.one_in(3)
    x = w.take("x", f"torch.randn(b, n, {width})")
    first = w.pick("attention", "attention", "encoder layer", "encoder", "decoder layer")
    if first != "attention":
        crossed = crossed or first == "decoder layer"
        y = w.take("y", f"torch.randn(b, m, {width})") if crossed else x
        returned(w, _stack(w, first, x, y, width, heads), [])
        return crossed
    y = w.take("y", f"torch.randn(b, m, {width})") if crossed else x
    options = w.pick("", ", bias=False", ", add_bias_kv=True", ", add_zero_attn=True")
    layer = w.layer("attention", f"nn.MultiheadAttention({width}, {heads}, batch_first=True"
                                 f"{options})")
    call = [w.pick("", "need_weights=False", "average_attn_weights=False"), *_masks(w, x, y)]
    out = w.let("o", f"{layer}({', '.join([x, y, y, *filter(None, call)])})")
    weights = [f"{out}[1]"] if "need_weights" not in call[0] and w.one_in(2) else []
    returned(w, w.let("x", f"{out}[0] + {x}"), weights)
    return crossed


def _masks(w: Writer, x: str, y: str) -> list[str]:
    grid = f"torch.ones({x}.shape[1], {y}.shape[1], dtype=torch.bool)"
    how = w.pick([], ["attn_mask"], ["key_padding_mask"], ["attn_mask", "key_padding_mask"])
    if "key_padding_mask" in how:
        w.take("kept", "(torch.arange(m) + torch.arange(b)[:, None]) % 3 != 1")
    mask = w.pick(f"{grid}.triu(1)", f"torch.zeros({grid}.shape).masked_fill({grid}.triu(1), "
                  f"-math.inf).to({x}.dtype)") if "key_padding_mask" not in how \
        else f"{grid}.triu(1)"
    return [f"{name}={mask if name == 'attn_mask' else '~kept'}" for name in how]


def _stack(w: Writer, first: str, x: str, y: str, width: int, heads: int) -> str:
    options = w.pick("", ", norm_first=True", ', activation="gelu"')
    if first == "decoder layer":
        layer = w.layer("decoder", f"nn.TransformerDecoderLayer({width}, {heads}, 7, "
                                   f"batch_first=True{options})")
        return w.let("x", f"{layer}({x}, {y})")
    one = f"nn.TransformerEncoderLayer({width}, {heads}, 7, batch_first=True{options})"
    layer = w.layer("encoder", one if first == "encoder layer"
                    else f"nn.TransformerEncoder({one}, 2, enable_nested_tensor=False)")
    if w.one_in(2):
        w.take("kept", "(torch.arange(n) + torch.arange(b)[:, None]) % 3 != 1")
        return w.let("x", f"{layer}({x}, src_key_padding_mask=~kept)")
    causal = f"torch.ones({x}.shape[1], {x}.shape[1], dtype=torch.bool).triu(1)"
    return w.let("x", f"{layer}({x}, {w.pick('', causal)})".replace(", )", ")"))
