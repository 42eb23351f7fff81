"""A linear layer with 1-bit weights and, by default, 1-bit activations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.nn import arguments, bitorch
from bincompile.ops.binary_linear import ACTIVATIONS
from bincompile.ops.fake_binary_linear import fake_binary_linear
from bincompile.ops.fake_bitorch_linear import fake_bitorch_linear

SCALES = ("row", "tensor")
_SCALE_KEY = "calibrated_scale"


class BinaryLinear(nn.Module):
    """y = s(x) * a * (sign(x + shift) @ sign(W)^T) + bias, with sign(0) = +1.

    `a` is the mean |W| of each output row, or of the whole matrix; `s(x)` is the mean |x + shift|
    of each input row, or one stored number. Training and inference give the same values; the
    float weight is the only copy, so nothing can go stale. `bincompile.optimize` packs it to bits.

    Args:
        in_features: K, any size.
        out_features: N.
        bias: add a learned (N,) vector.
        activation: "binary" uses sign(x + shift); "float" uses x + shift itself and no s(x);
            "int8" uses x + shift as 8-bit integers with a scale for each row.
        activation_scale: "row" (from each row as it comes) or "tensor" (see `calibrate`).
        weight_scale: "row" (one per output) or "tensor" (one for the matrix).
        shift: learn a (K,) vector that is added to the input before its sign is taken.
        compat: "bitorch" keeps the formulas and the state dict of bitorch-engine's layer, see
            below; it leaves no choice of bias, activation, scales or shift.
        symmetric: with compat="bitorch", the first scale is 2 mean |x|; if False, 4 mean |x|.
        device: where the parameters are made.
        dtype: float dtype of the parameters.

    Shape:
        (..., K) in any float dtype to (..., N) in the same dtype; sums run in float32, or in
        float64 for float64.

    Raises:
        ConfigError: an argument of the wrong kind, or a forward before `calibrate`.
        InputError: an input whose last dimension is not K.
        InputTypeError: an input that is not of a float dtype.

    Gradients are straight-through: a sign's gradient passes where |x + shift| <= 2 s(x).

    With compat="bitorch", y = (scale_a * scale_w) * (sign(x + bias_a) @ sign(W)^T). scale_a, which
    is learned, is set from the first batch, in training or not, before bias_a is added; a batch of
    zeros leaves it unset. `calibrate` and `load_state_dict` set it too, and one of these has to
    come before an export. scale_w is 1 until `prepare_params`. State dicts hold weight, bias_a,
    scale_a and scale_w; the engine's int8 weights and its qweight (uint8 or int8) load. Where the
    engine crashes, gives nan or contradicts itself we don't follow: weights without a positive
    value after centring, any K, any float dtype with one rounding at the end, sign(0) = +1 in the
    gradient too, a gradient of scale_a that is not clipped, and float gradients of the weight.
    The gradient of a sign then passes where |x + bias_a| <= |scale_a|.

    Source: XNOR-Net (arXiv:1603.05279) and the straight-through estimator (arXiv:1308.3432).

    Example:
        >>> layer = BinaryLinear(3, 1, dtype=torch.float64)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.5, -0.25, 0.75]]))
        >>> layer(torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float64)).item()
        -1.0
    """

    calibrated_scale: nn.Parameter | None
    scale_w: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *,
                 activation: str = "binary", activation_scale: str = "row",
                 weight_scale: str = "row", shift: bool = False, compat: str | None = None,
                 symmetric: bool = True, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        self.compat = arguments.compat(name, compat)
        self.symmetric = arguments.flag(name, "symmetric", symmetric)
        self.in_features = arguments.size(name, "in_features", in_features)
        self.out_features = arguments.size(name, "out_features", out_features)
        self.activation = arguments.choice(name, "activation", activation, ACTIVATIONS)
        self.activation_scale = arguments.choice(name, "activation_scale", activation_scale, SCALES)
        self.weight_scale = arguments.choice(name, "weight_scale", weight_scale, SCALES)
        if activation != "binary" and activation_scale == "tensor":
            raise ConfigError(f"{name}(activation={activation!r}, activation_scale='tensor')",
                              "a stored scale only with activation='binary'",
                              "leave activation_scale out: only signs have a stored scale")
        if compat is None:
            arguments.without(name, "compat=None", symmetric=(symmetric, True))
        else:
            arguments.without(name, "compat='bitorch'", bias=(bias, False),
                              activation=(activation, "binary"))
            self.activation_scale = self.weight_scale = "tensor"
        self._make_parameters(arguments.flag(name, "bias", bias),
                              arguments.flag(name, "shift", shift),
                              {"device": device, "dtype": arguments.float_dtype(name, dtype)})
        self.reset_parameters()

    def _make_parameters(self, bias: bool, shift: bool, options: dict[str, Any]) -> None:
        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, **options)) if wanted else None

        engine = self.compat == "bitorch"
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **options))
        self.bias = parameter(bias, self.out_features)
        self.shift = parameter(shift and not engine, self.in_features)
        self.register_parameter(_SCALE_KEY, None)
        if engine:
            self.bias_a = nn.Parameter(torch.empty(self.in_features, **options))
            self.scale_a = nn.Parameter(torch.empty((), **options))
            self.register_buffer("scale_w", torch.empty((), **options))

    def reset_parameters(self) -> None:
        """Fresh random weights, a zero shift; a scale that was set is forgotten."""
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.shift is not None:
            nn.init.zeros_(self.shift)
        self.calibrated_scale = None
        self._has_first_scale = False
        if self.compat == "bitorch":
            nn.init.zeros_(self.bias_a)
            nn.init.zeros_(self.scale_a)
            nn.init.ones_(self.scale_w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.compat == "bitorch":
            if not self._has_first_scale:
                self._take_first_scale(x)
            return fake_bitorch_linear.overload(x, self.weight, self.scale_a, self.scale_w,
                                                self.bias_a)
        if self.activation_scale == "tensor" and self.calibrated_scale is None:
            raise ConfigError(f"{type(self).__name__}(activation_scale='tensor') without a scale",
                              "a forward after calibrate(loader) or load_state_dict",
                              "call layer.calibrate(loader) first, or use activation_scale='row'")
        return fake_binary_linear.overload(x, self.weight, self._row_scales(), self.bias,
                                           self.activation, self.calibrated_scale, self.shift)

    @torch.no_grad()
    def _take_first_scale(self, x: torch.Tensor) -> None:
        """Set scale_a from a batch, unless it is set already; zeros set nothing."""
        if torch.compiler.is_compiling():
            self.check_before_capture()
        if not self.scale_a.is_nonzero() and x.numel():
            self._store_first_scale(x.abs().mean())
        self._has_first_scale = bool(self.scale_a.is_nonzero())

    def _store_first_scale(self, mean: torch.Tensor) -> None:
        scale = (2 if self.symmetric else 4) * mean
        if not scale.isfinite():
            raise InputError("NaN or infinity in the batch that sets scale_a", "finite inputs",
                             "the first input of the layer, or calibrate it before")
        self.scale_a.copy_(scale)

    def check_before_capture(self) -> None:
        """Raise if a forward would still change the layer, as none may in a graph.

        Raises:
            ConfigError: compat="bitorch", and no scale yet.
        """
        if self.compat == "bitorch" and not self._has_first_scale:
            raise ConfigError(f"{type(self).__name__}(compat='bitorch') without a scale_a",
                              "a layer that is exported after its scale is set",
                              "call it once on data, or calibrate(loader), or load_state_dict")

    @torch.no_grad()
    def prepare_params(self) -> None:
        """Make the engine's 8-bit weight and scale_w from a float weight, as it does before it
        trains: once, after the float weight is there.

        Raises:
            ConfigError: a layer without compat="bitorch", whose scales follow the weight.

        Example:
            >>> layer = BinaryLinear(4, 1, compat="bitorch")
            >>> with torch.no_grad():
            ...     _ = layer.weight.copy_(torch.tensor([[-10.0, -1.0, 1.0, 2.0]]))
            >>> layer.prepare_params()
            >>> layer.weight.tolist(), layer.scale_w.item()
            ([[-127.0, 32.0, 95.0, 127.0]], 3.5)
        """
        if self.compat != "bitorch":
            raise ConfigError("prepare_params with compat=None", "compat='bitorch'",
                              "leave the call out: scales follow the weight")
        weight, scale = bitorch.prepare_weight(self.weight)
        self.weight.copy_(weight)
        self.scale_w.copy_(scale)

    def _row_scales(self) -> torch.Tensor:
        """Mean |W|: (out_features,), or (1,) for the whole matrix, in float32 or wider."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        if self.weight_scale == "row":
            return self.weight.abs().mean(1, dtype=wide)
        return self.weight.abs().mean((0, 1), dtype=wide).reshape(1)

    @torch.no_grad()
    def calibrate(self, loader: Iterable[Any]) -> BinaryLinear:
        """Store the mean |x + shift| over inputs of this layer as its activation scale.

        With compat="bitorch" it sets scale_a, to 2 or 4 times the mean |x|.

        The scale becomes a parameter, so calibrate before the optimizer is made.

        Args:
            loader: yields inputs (..., in_features), or tuples whose first item is one. Every
                number counts the same, whatever the sizes of the batches.

        Returns:
            The layer itself.

        Raises:
            ConfigError: the layer has activation_scale="row".
            InputError: no data, a NaN or infinity, only zeros, or a wrong last dimension.
            InputTypeError: an item that is not a float tensor.

        Example:
            >>> layer = BinaryLinear(4, 2, activation_scale="tensor")
            >>> layer.calibrate([torch.ones(3, 4), -2 * torch.ones(1, 4)]).calibrated_scale.item()
            1.25
        """
        if self.activation_scale != "tensor":
            raise ConfigError(f"calibrate with activation_scale={self.activation_scale!r}",
                              "activation_scale='tensor'", "the layer's activation_scale argument")
        total, count = 0.0, 0
        for batch in loader:
            x = self._calibration_input(batch).double()
            total += (x if self.shift is None else x + self.shift).abs().sum().item()
            count += x.numel()
        if not math.isfinite(total) or total == 0.0:
            found = ("no data" if count == 0 else "only zeros" if total == 0.0
                     else "NaN or infinity in the data")
            raise InputError(f"calibrate found {found}", "finite inputs that are not all zero",
                             "the loader given to calibrate")
        if self.compat == "bitorch":
            self._store_first_scale(torch.tensor(total / count))
            self._has_first_scale = True
        else:
            self.calibrated_scale = nn.Parameter(self.weight.new_tensor(total / count))
        return self

    def _calibration_input(self, batch: Any) -> torch.Tensor:
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
            found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputTypeError(f"a calibration batch of {found}", "a float tensor",
                                 "what the loader yields")
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise InputError(f"a calibration batch of shape {tuple(x.shape)}",
                             f"(..., {self.in_features})", "what the loader yields")
        return x

    @classmethod
    def from_float(cls, linear: nn.Linear, **options: Any) -> BinaryLinear:
        """A binary layer that starts from the weight and bias of a float one.

        Args:
            linear: copied, not changed.
            options: keyword options of the constructor, e.g. `activation="float"`. With
                compat="bitorch" the weight is prepared too, as by `prepare_params`.

        Raises:
            InputTypeError: not an `nn.Linear`.

        Example:
            >>> BinaryLinear.from_float(nn.Linear(8, 4), shift=True)
            BinaryLinear(in_features=8, out_features=4, bias=True, activation='binary', shift=True)
        """
        if not isinstance(linear, nn.Linear):
            raise InputTypeError(f"from_float of a {type(linear).__name__}", "an nn.Linear",
                                 "the argument of from_float")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None,
                    device=linear.weight.device, dtype=linear.weight.dtype, **options)
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        if layer.compat == "bitorch":
            layer.prepare_params()
        return layer.train(linear.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        engine, errors = self.compat == "bitorch", rest[-1]
        errors += (bitorch.read_weight(state_dict, prefix, self.weight.shape, self.weight.dtype)
                   if engine else bitorch.unread_keys(state_dict, prefix))
        stored = state_dict.get(prefix + _SCALE_KEY)
        if stored is not None and self.activation_scale == "tensor" and not engine \
                and self.calibrated_scale is None:
            self.calibrated_scale = nn.Parameter(torch.empty_like(stored, dtype=self.weight.dtype,
                                                                  device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if engine:
            self._has_first_scale = not self.scale_a.is_meta and bool(self.scale_a.is_nonzero())

    def extra_repr(self) -> str:
        """The sizes, and every option that is not at its default."""
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}",
                 f"bias={self.bias is not None}", f"activation={self.activation!r}"]
        parts += [f"{name}='tensor'" for name in ("activation_scale", "weight_scale")
                  if getattr(self, name) == "tensor"]
        parts += ["shift=True"] * (self.shift is not None)
        parts += ["compat='bitorch'"] * (self.compat == "bitorch")
        return ", ".join(parts + ["symmetric=False"] * (not self.symmetric))
