"""The arguments of operators that a model stores, as tests of kernels give them."""

STORED = ("weight", "weight_scale", "bias", "shift", "activation_scale", "table", "row_scale",
          "weight_ih", "weight_hh", "bias_ih", "bias_hh")
