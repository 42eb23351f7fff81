"""Source of what happens between the product of query and key and that with the values."""

from __future__ import annotations

from collections.abc import Callable

from fuzz_attention import (
    Geometry,
    Writer,
    laid_out,
    merged,
    positioned,
    product,
    projected,
    weighed,
)

LOW = ("-math.inf", "-1e9", "torch.finfo({s}.dtype).min", "-1e4")


def attention(w: Writer, x: str, y: str, g: Geometry) -> tuple[str, list[str]]:
    """An attention of x over y; returns its result and what else may be returned."""
    q, k, v = projected(w, x, y, g)
    q, k = positioned(w, q, k, g)
    if w.one_in(7):
        return torch_attention(w, q, k, v, x, g), []
    q, k, v = laid_out(w, q, k, v, g)
    late = w.pick("none", "scores", "query", "key", "both", "learned", "tensor", "sizes", "place")
    if late in ("query", "both"):
        q = w.let("q", w.pick("{t} * 0.4", "{t} / math.sqrt({d})", "0.4 * {t}",
                              "{t} * {t}.shape[-1] ** -0.5").format(t=q, d=g.features))
    if late in ("key", "both"):
        k = w.let("k", f"{k} * {g.features} ** -0.25")
    s = product(w, q, k, g)
    i, j = f"{x}.shape[1]", f"{y}.shape[1]"
    steps: list[Callable[[str], str]] = [lambda s: scaled(w, s, late, x, g)]
    steps += [lambda s: biased(w, s, i, j, x, y, g)] * w.pick(0, 0, 0, 1, 1, 2)
    steps += [lambda s: masked(w, s, i, j, g)] * w.pick(0, 0, 1, 1, 2)
    steps += [lambda s: capped(w, s)] if w.one_in(8) else []
    steps += [lambda s: mixed(w, s, g)] if w.one_in(12) and g.layout == "split" else []
    if w.one_in(3):
        first = w.pick(*range(len(steps)))
        steps = steps[first:] + steps[:first]
    for step in steps:
        s = step(s)
    if w.one_in(10):
        return wrong(w, s, q, k, v, f"{x}.shape[0]", g), [s]
    p, divisor = softmax(w, s, g)
    p = changed(w, p, g)
    out = weighed(w, p, v, g)
    if divisor:
        out = w.let("o", f"{out} / {divisor}")
    return merged(w, out, f"{x}.shape[0]", g), w.pick([], [], [p], [f"{p}.mean(1)"], [s])


def scaled(w: Writer, s: str, how: str, x: str, g: Geometry) -> str:
    """The scores by a factor."""
    if how == "scores":
        return w.let("s", w.pick("{s} / math.sqrt({d})", "{s} * 0.4", "0.4 * {s}",
                                 "{s}.div({d} ** 0.5)", "{s} / -2.5").format(s=s, d=g.features))
    if how == "learned":
        factor = w.let("c", f"{w.parameter(g.heads, 1, 1)}.abs() + 0.1")
        return w.let("s", f"{s} {w.pick('*', '/')} {g.per_head(factor, f'{x}.shape[0]')}")
    if how == "tensor":
        return w.let("s", f"{s} * {w.pick('torch.tensor(0.4)', w.parameter(1))}")
    if how == "sizes":
        return w.let("s", w.pick(f"{s} / {x}.shape[1]", f"{s} * math.log({x}.shape[1] + 1)"))
    if how == "place":
        w.body.append(w.pick(f"{s}.mul_(0.4)", f"{s} *= 0.4", f"{s}.div_(3)"))
    return s


def biased(w: Writer, s: str, i: str, j: str, x: str, y: str, g: Geometry) -> str:
    """The scores plus something."""
    far = f"(torch.arange({j})[None, :] - torch.arange({i})[:, None])"
    how = w.pick("heads", "alibi", "table", "input", "keys", "number", "subtracted", "alpha")
    batch = f"{x}.shape[0]"
    if how == "heads":
        bias = g.per_head(w.parameter(g.heads, 1, 1), batch)
    elif how == "alibi":
        slopes = f"(2.0 ** -torch.arange({g.heads}).to({s}.dtype))[:, None, None]"
        bias = g.per_head(w.let("b", f"-{slopes} * {far}.abs()"), batch)
    elif how == "table":
        table = w.layer("table", f"nn.Embedding(9, {g.heads})")
        bias = g.per_head(w.let("b", f"{table}({far}.clamp(-4, 4) + 4).permute(2, 0, 1)"), batch)
    elif how == "keys":
        layer = w.layer("linear", f"nn.Linear({g.width}, 1)")
        bias = g.per_row(w.let("b", f"{layer}({y}).squeeze(-1)"))
    else:
        bias = w.take("bias", "torch.randn(n, m)")
    bias = g.oriented(bias)
    form = {"number": f"{s} + 0.5", "subtracted": f"{s} - {bias}",
            "alpha": f"torch.add({s}, {bias}, alpha=0.5)"}.get(
                how, w.pick(f"{s} + {bias}", f"{bias} + {s}", f"{s}.add({bias})"))
    return w.let("s", form)


def masked(w: Writer, s: str, i: str, j: str, g: Geometry) -> str:
    """The scores with some keys dropped."""
    grid = f"torch.ones({i}, {j}, dtype=torch.bool)"
    far = f"(torch.arange({i})[:, None] - torch.arange({j})[None, :])"
    how = w.pick("causal", "padding", "window", "lengths", "causal and padding", "input",
                 "diagonal", "query")
    if how == "causal":
        kept = w.pick(f"{grid}.tril()", f"({far} >= 0)", f"~{grid}.triu(1)")
    elif how == "window":
        kept = w.pick(f"({far}.abs() < 3)", f"(({far} >= 0) & ({far} < 3))")
    elif how == "lengths":
        w.take("lengths", "torch.arange(b) % m + 1")
        kept = g.per_row(f"(torch.arange({j})[None] < lengths[:, None])")
    elif how == "input":
        w.take("allowed", "torch.rand(n, m) > 0.3")
        kept = f"allowed[:{i}, :{j}]" if w.one_in(2) else "allowed"
    elif how == "diagonal":
        kept = f"({far} != 0)"
    elif how == "query":
        kept = f"(torch.arange({i})[:, None] != 1)"
    else:
        w.take("kept", "(torch.arange(m) + torch.arange(b)[:, None]) % 3 != 1")
        kept = g.per_row(w.pick("kept", "kept.to(torch.int64)[:, :].bool()"))
        kept = f"({grid}.tril() & {kept})" if "causal" in how else kept
    kept = w.let("kept", g.oriented(kept))
    low = w.pick(*LOW).format(s=s)
    return _dropped(w, s, kept, low)


def _dropped(w: Writer, s: str, kept: str, low: str) -> str:
    how = w.pick("fill", "where", "add", "scaled", "place", "added filled", "where swapped")
    if how == "place":
        w.body.append(f"{s}.masked_fill_(~{kept}, {low})")
        return s
    if (how == "scaled" and "math.inf" in low) or (how == "added filled" and "finfo" in low):
        low = "-1e9"  # 0 * inf is nan; a number of float64 does not fit where's float32
    w.rough |= low.startswith("-1e")
    return w.let("s", {
        "fill": f"{s}.masked_fill(~{kept}, {low})", "where": f"torch.where({kept}, {s}, {low})",
        "where swapped": f"torch.where(~{kept}, {low}, {s})",
        "add": f"{s} + torch.zeros({kept}.shape, dtype={s}.dtype).masked_fill(~{kept}, {low})",
        "scaled": f"{s} + (1.0 - {kept}.to({s}.dtype)) * {low}",
        "added filled": f"{s} + torch.where({kept}, 0.0, {low}).to({s}.dtype)"}[how])


def capped(w: Writer, s: str) -> str:
    """The scores within bounds."""
    return w.let("s", w.pick(f"3.0 * torch.tanh({s} / 3.0)", f"torch.tanh({s}) * 2",
                             f"{s}.clamp(-2, 2)", f"({s} / 3).tanh().mul(3)"))


def mixed(w: Writer, s: str, g: Geometry) -> str:
    """The scores of a head from those of all heads."""
    weight = w.parameter(g.heads, g.heads)
    conv = w.layer("conv", f"nn.Conv2d({g.heads}, {g.heads}, 1)")
    layer = w.layer("mix", f"nn.Linear({g.heads}, {g.heads})")
    return w.let("s", w.pick(f"torch.einsum('bhij,gh->bgij', {s}, {weight})", f"{conv}({s})",
                             f"{layer}({s}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"))


def softmax(w: Writer, s: str, g: Geometry) -> tuple[str, str]:
    """The probabilities, and what the product with the values is divided by, if anything."""
    d, rank = (-2 if g.flipped else -1), {"split": 4, "merged": 3, "grouped": 5}[g.layout]
    how = w.pick("torch", "functional", "method", "positive", "float32", "layer", "guarded",
                 "detached", "logs", "late", "unguarded", "epsilon", "sink")
    plain = {"torch": f"torch.softmax({s}, {d})", "functional": f"functional.softmax({s}, dim={d})",
             "method": f"{s}.softmax(dim={d})", "positive": f"torch.softmax({s}, {rank + d})",
             "float32": f"functional.softmax({s}, dim={d}, dtype=torch.float32).to({s}.dtype)",
             "logs": w.pick(f"functional.log_softmax({s}, {d}).exp()",
                            f"torch.exp({s} - torch.logsumexp({s}, {d}, keepdim=True))")}
    if how in plain:
        return w.let("p", plain[how]), ""
    if how == "layer":
        return w.let("p", f"{w.layer('softmax', f'nn.Softmax(dim={d})')}({s})"), ""
    if how == "sink":
        one = list(map(str, [f"{s}.shape[{a}]" for a in range(rank)]))
        one[rank + d] = "1"
        sink = f"{w.parameter(1)}.expand({', '.join(one)})"
        joined = w.let("s", f"torch.cat([{s}, {sink}], {d})")
        p = w.let("p", f"torch.softmax({joined}, {d})")
        return w.let("p", f"{p}[..., :-1]" if d == -1 else f"{p}[..., :-1, :]"), ""
    top = {"unguarded": "0.0", "detached": f"{s}.max({d}, keepdim=True).values.detach()",
           }.get(how, w.pick(f"{s}.amax({d}, keepdim=True)", f"{s}.max({d}, keepdim=True)[0]"))
    powers = w.let("e", f"torch.exp({s})" if how == "unguarded" else f"torch.exp({s} - {top})")
    w.unguarded |= how == "unguarded"
    total = w.let("z", f"{powers}.sum({d}, keepdim=True)")
    if how == "late" and not g.flipped:
        return powers, total
    return w.let("p", f"{powers} / ({total} + 1e-6)" if how == "epsilon"
                 else f"{powers} / {total}"), ""


def changed(w: Writer, p: str, g: Geometry) -> str:
    """What else happens to probabilities."""
    how = w.pick("", "", "", "", "dropout", "nan", "heads", "cast", "mixed", "scaled")
    if how == "dropout":
        return w.let("p", w.pick(f"functional.dropout({p}, 0.1, self.training)",
                                 f"{w.layer('dropout', 'nn.Dropout(0.1)')}({p})"))
    if how == "heads" and g.layout == "split":
        return w.let("p", f"{p} * {w.parameter(g.heads, 1, 1)}")
    if how == "mixed":
        return mixed(w, p, g) if g.layout == "split" else p
    return w.let("p", {"nan": f"torch.nan_to_num({p}, 0.0)", "cast": f"{p}.to({p}.dtype)",
                       "scaled": f"{p} * 0.5"}[how]) if how in ("nan", "cast", "scaled") else p


def wrong(w: Writer, s: str, q: str, k: str, v: str, batch: str, g: Geometry) -> str:
    """Something that is not attention, or is it twice."""
    d = -2 if g.flipped else -1
    p = w.pick(f"torch.softmax({s}, {-3 - d})", f"torch.softmax({s}, 0)",
               f"torch.softmax({s}, -3)", f"torch.relu({s}) / 3", f"torch.sigmoid({s})",
               f"torch.softmax(torch.softmax({s}, {d}), {d})", f"torch.softmax(-{s}.abs(), {d})",
               f"torch.softmax({s}, {d}) + {s}", f"torch.softmax({s} * {s}, {d})",
               f"torch.softmax({s} - {s}.mean({d}, keepdim=True), {d})",
               f"torch.softmax({s}, {d}) * torch.softmax({s}, {-3 - d})",
               f"torch.softmax({s}, {d}) - torch.softmax({s} / 2, {d})")
    return merged(w, weighed(w, w.let("p", p), v, g), batch, g)


def torch_attention(w: Writer, q: str, k: str, v: str, x: str, g: Geometry) -> str:
    """torch's own operator."""
    options = []
    if g.repeats > 1:
        if w.one_in(2):
            options.append("enable_gqa=True")
        else:
            k, v = (w.let("r", f"{t}.repeat_interleave({g.repeats}, 1)") for t in (k, v))
    mask = w.pick("", "causal", "bool", "float", "heads", "rows")
    i, j = f"{q}.shape[-2]", f"{k}.shape[-2]"
    grid = f"torch.ones({i}, {j}, dtype=torch.bool).tril()"
    slopes = f"torch.linspace(0, 1, {g.heads}).to({q}.dtype)[:, None, None]"
    options += {"": [], "causal": ["is_causal=True"], "bool": [f"attn_mask={grid}"],
                "float": [f"attn_mask=torch.where({grid}, 0.0, -math.inf).to({q}.dtype)"],
                "heads": [f"attn_mask={slopes} * torch.ones({i}, {j}, dtype={q}.dtype)"],
                "rows": [f"attn_mask={grid} & (torch.arange({i}) != 1)[:, None]"]}[mask]
    options += w.pick([], ["scale=0.4"], ["dropout_p=0.0"])
    call = ", ".join([q, k, v, *options])
    out = w.let("o", f"functional.scaled_dot_product_attention({call})")
    return merged(w, out, f"{x}.shape[0]", Geometry(g.heads, g.kept, g.features))
